// The forward kernel: panels of the stream, each copied tile by tile while the one before it is multiplied, so that
// reading memory hides behind the products and every row of a tile lies beside the next one.
#pragma once

#include <type_traits>

#include "masked_read_few.h"
#include "products.h"

namespace fastcircuit {
namespace FC_ISA {

constexpr int64_t kMaxPanelTiles = 16, kPanelBytes = 512 * 1024;
constexpr int64_t kPanelsPerRange = 4;  // at least: nothing hides the copy of the first one

// acc[Rows, kTile] += z[steps, Rows]^T packed[steps, kTile], going on to what follows both.
template <class S, int Rows, class F = typename Products<S>::Factor, class A = typename Products<S>::A>
FC_INLINE void add_tile_products(Vec<A> (&acc)[Rows][kVecs], const F*& z, const F*& packed, int64_t steps,
                                 typename Products<S>::Parts parts) {
  for (int64_t step = 0; step < steps; ++step, packed += kTile<F>) {
    Vec<F> d[kVecs];
    for (int v = 0; v < kVecs; ++v) d[v] = Traits<F>::load(packed + v * Simd<F>::kLanes);
    for (int part = 0; part < parts; ++part, z += Rows)
      for (int i = 0; i < Rows; ++i) {
        const Vec<F> zi = splat(z[i]);
        for (int v = 0; v < kVecs; ++v) Products<S>::add(acc[i][v], zi, d[v]);
      }
  }
}

// out[Rows, kTile] = base + z[steps, Rows]^T packed[steps, kTile], with a step of the next panel's copy every `pace`.
template <class S, int Rows, bool Around, class F = typename Products<S>::Factor, class A = typename Products<S>::A>
FC_INLINE void read_tile(const F* z, const F* packed, int64_t steps, int64_t pace, typename Products<S>::Parts parts,
                         const S* base, S* out, int64_t out_stride, typename Products<S>::Copy& copy) {
  Vec<A> acc[Rows][kVecs];
  for (int v = 0; v < kVecs; ++v) {
    const Vec<A> start = base ? Traits<S>::load(base + v * Simd<A>::kLanes) : Vec<A>{};
    for (int i = 0; i < Rows; ++i) acc[i][v] = start;
  }
  typename Products<S>::Copy next = copy;  // a reference would be written back at every step
  for (int64_t left = steps; left > 0; left -= pace) {
    next.step();
    add_tile_products<S, Rows>(acc, z, packed, left < pace ? left : pace, parts);
  }
  copy = next;
  for (int i = 0; i < Rows; ++i) store_tile_row<Around>(out + i * out_stride, acc[i]);
}

template <class S, bool Around, int Rows = kRows, class F = typename Products<S>::Factor>
FC_INLINE void read_tile_rows(int64_t rows, const F* z, const F* packed, int64_t steps, int64_t pace,
                              typename Products<S>::Parts parts, const S* base, S* out, int64_t out_stride,
                              typename Products<S>::Copy& copy) {
  if (rows == Rows) {
    read_tile<S, Rows, Around>(z, packed, steps, pace, parts, base, out, out_stride, copy);
  } else if constexpr (Rows > 1) {
    read_tile_rows<S, Around, Rows - 1>(rows, z, packed, steps, pace, parts, base, out, out_stride, copy);
  }
}

// One tile for all readers. `base` must be readable for a whole tile.
template <class S, bool Around, class F = typename Products<S>::Factor>
void read_tile_all(const ReadParams& p, const F* panels, const F* packed, const S* base, S* out, int64_t out_stride,
                   typename Products<S>::Copy& copy) {
  const RowBlocks blocks(p.readers, kRows);
  const int64_t steps = Products<S>::steps(p.writers);
  const typename Products<S>::Parts parts(p.mask_parts);
  for (int64_t block = 0; block < blocks.count; ++block) {
    const int64_t r = blocks.begin(block);
    read_tile_rows<S, Around>(blocks.rows(block), panels + r * steps * parts, packed, steps, blocks.count, parts, base,
                              out + r * out_stride, out_stride, copy);
  }
}

// A last tile narrower than kTile goes through copies that are a whole tile wide.
template <class S, class F = typename Products<S>::Factor>
void read_edge(const ReadParams& p, const F* panels, F* packed, S* copies, int64_t begin, int64_t width) {
  constexpr int64_t kWide = kTile<F>;
  S *base = copies, *out = copies + kWide;
  Products<S>::pack_edge(static_cast<const S*>(p.stream) + begin, p.stream_stride, p.writers, width, packed);
  std::memset(base, 0, sizeof(S) * kWide);
  if (p.base) std::memcpy(base, static_cast<const S*>(p.base) + begin, sizeof(S) * width);
  typename Products<S>::Copy nothing;
  read_tile_all<S, false>(p, panels, packed, base, out, kWide, nothing);
  for (int64_t r = 0; r < p.readers; ++r)
    std::memcpy(static_cast<S*>(p.reads) + r * p.reads_stride + begin, out + r * kWide, sizeof(S) * width);
}

template <class S, class F = typename Products<S>::Factor>
int64_t tile_bytes(const ReadParams& p) {
  return kTile<F> * Products<S>::steps(p.writers) * int64_t(sizeof(F));
}

template <class S>
int64_t most_panel_tiles(const ReadParams& p) {
  int64_t tiles = 1;
  while (tiles < kMaxPanelTiles && 2 * tiles * tile_bytes<S>(p) <= kPanelBytes) tiles *= 2;
  return tiles;
}

// Two panels, and copies for the edge.
template <class S, class A = typename Traits<S>::Accumulate>
int64_t read_scratch(const ReadParams& p) {
  if (p.readers <= kFewReaders) return p.readers * kFewColumns * sizeof(A);
  return 2 * most_panel_tiles<S>(p) * tile_bytes<S>(p) + kTile<A> * (1 + p.readers) * int64_t(sizeof(S));
}

template <class S>
void read_range(const ReadParams& p, const void* panels, void* scratch, int64_t begin, int64_t end) {
  using A = typename Products<S>::A;
  using F = typename Products<S>::Factor;
  using Copy = typename Products<S>::Copy;
  if constexpr (std::is_same_v<F, A>)
    if (p.readers <= kFewReaders)
      return read_few_range<S>(p, static_cast<const A*>(panels), static_cast<A*>(scratch), begin, end);
  const F* const z = static_cast<const F*>(panels);
  const S* stream = static_cast<const S*>(p.stream);
  const S* base = static_cast<const S*>(p.base);
  S* reads = static_cast<S*>(p.reads);
  const int64_t most = most_panel_tiles<S>(p), tile_size = Products<S>::steps(p.writers) * kTile<F>;
  const int64_t some = (end - begin) / kTile<F> / kPanelsPerRange, tiles = some < 1 ? 1 : some < most ? some : most;
  F *packed = static_cast<F*>(scratch), *other = packed + most * tile_size;
  S* const copies = reinterpret_cast<S*>(other + most * tile_size);
  const auto copy_from = [&](int64_t first, F* to) {
    const int64_t whole = (end - first) / kTile<F>;
    return whole > 0 ? Copy(stream + first, p.stream_stride, p.writers, whole < tiles ? whole : tiles, to)
                     : Copy();
  };
  const bool around = goes_around_cache(reads, p.readers, p.reads_stride * int64_t(sizeof(S)));
  const auto tile = around ? read_tile_all<S, true> : read_tile_all<S, false>;
  copy_from(begin, packed).finish();
  while (begin + kTile<F> <= end) {
    const int64_t next = begin + tiles * kTile<F>;
    Copy copy = next < end ? copy_from(next, other) : Copy();
    for (const F* part = packed; begin < next && begin + kTile<F> <= end; begin += kTile<F>, part += tile_size)
      tile(p, z, part, base ? base + begin : nullptr, reads + begin, p.reads_stride, copy);
    copy.finish();
    F* const done = packed;
    packed = other, other = done;
  }
  finish_stores_around_cache();
  if (begin < end) read_edge<S>(p, z, packed, copies, begin, end - begin);
}

}  // namespace FC_ISA
}  // namespace fastcircuit
