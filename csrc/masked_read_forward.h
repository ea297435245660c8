// The forward kernel: panels of the stream, each copied tile by tile while the one before it is multiplied, so that
// reading memory hides behind the products and every row of a tile lies beside the next one.
#pragma once

#include "masked_read_few.h"
#include "panel.h"

namespace fastcircuit {
namespace FC_ISA {

constexpr int64_t kMaxPanelTiles = 16, kPanelBytes = 512 * 1024;
constexpr int64_t kPanelsPerRange = 4;  // at least: nothing hides the copy of the first one

// acc[Rows, kTile] += z[steps, Rows]^T packed[steps, kTile], going on to what follows both.
template <int Rows, class A>
FC_INLINE void add_tile_products(Vec<A> (&acc)[Rows][kVecs], const A*& z, const A*& packed, int64_t steps) {
  for (int64_t w = 0; w < steps; ++w, z += Rows, packed += kTile<A>) {
    Vec<A> d[kVecs];
    for (int v = 0; v < kVecs; ++v) d[v] = Traits<A>::load(packed + v * Simd<A>::kLanes);
    for (int i = 0; i < Rows; ++i) {
      const Vec<A> zi = splat(z[i]);
      for (int v = 0; v < kVecs; ++v) acc[i][v] += zi * d[v];
    }
  }
}

// out[Rows, kTile] = base + z[W, Rows]^T packed[W, kTile], with a step of the next panel's copy every `pace` writers.
template <class S, int Rows, bool Around, class A = typename Traits<S>::Accumulate>
FC_INLINE void read_tile(const A* z, const A* packed, int64_t writers, int64_t pace, const S* base, S* out,
                         int64_t out_stride, PanelCopy<S>& copy) {
  constexpr int kLanes = Simd<A>::kLanes;
  Vec<A> acc[Rows][kVecs];
  for (int v = 0; v < kVecs; ++v) {
    const Vec<A> start = base ? Traits<S>::load(base + v * kLanes) : Vec<A>{};
    for (int i = 0; i < Rows; ++i) acc[i][v] = start;
  }
  PanelCopy<S> next = copy;  // a reference would be written back at every step
  for (int64_t left = writers; left > 0; left -= pace) {
    next.step();
    add_tile_products<Rows, A>(acc, z, packed, left < pace ? left : pace);
  }
  copy = next;
  for (int i = 0; i < Rows; ++i)
    for (int v = 0; v < kVecs; ++v) {
      if constexpr (Around) {
        Traits<S>::store_around_cache(out + i * out_stride + v * kLanes, acc[i][v]);
      } else {
        Traits<S>::store(out + i * out_stride + v * kLanes, acc[i][v]);
      }
    }
}

template <class S, bool Around, int Rows = kRows, class A = typename Traits<S>::Accumulate>
FC_INLINE void read_tile_rows(int64_t rows, const A* z, const A* packed, int64_t writers, int64_t pace, const S* base,
                              S* out, int64_t out_stride, PanelCopy<S>& copy) {
  if (rows == Rows) {
    read_tile<S, Rows, Around>(z, packed, writers, pace, base, out, out_stride, copy);
  } else if constexpr (Rows > 1) {
    read_tile_rows<S, Around, Rows - 1>(rows, z, packed, writers, pace, base, out, out_stride, copy);
  }
}

// One tile for all readers. `base` must be readable for a whole tile.
template <class S, bool Around, class A = typename Traits<S>::Accumulate>
void read_tile_all(const ReadParams& p, const A* panels, const A* packed, const S* base, S* out, int64_t out_stride,
                   PanelCopy<S>& copy) {
  const RowBlocks blocks(p.readers, kRows);
  for (int64_t block = 0; block < blocks.count; ++block) {
    const int64_t r = blocks.begin(block);
    read_tile_rows<S, Around>(blocks.rows(block), panels + r * p.writers, packed, p.writers, blocks.count, base,
                              out + r * out_stride, out_stride, copy);
  }
}

// A last tile narrower than kTile goes through copies that are a whole tile wide.
template <class S, class A = typename Traits<S>::Accumulate>
void read_edge(const ReadParams& p, const A* panels, A* packed, S* copies, int64_t begin, int64_t width) {
  constexpr int64_t kWide = kTile<A>;
  S *base = copies, *out = copies + kWide;
  pack_edge(static_cast<const S*>(p.stream) + begin, p.stream_stride, p.writers, width, packed);
  std::memset(base, 0, sizeof(S) * kWide);
  if (p.base) std::memcpy(base, static_cast<const S*>(p.base) + begin, sizeof(S) * width);
  PanelCopy<S> nothing;
  read_tile_all<S, false>(p, panels, packed, base, out, kWide, nothing);
  for (int64_t r = 0; r < p.readers; ++r)
    std::memcpy(static_cast<S*>(p.reads) + r * p.reads_stride + begin, out + r * kWide, sizeof(S) * width);
}

template <class S, class A = typename Traits<S>::Accumulate>
int64_t most_panel_tiles(const ReadParams& p) {
  int64_t tiles = 1;
  while (tiles < kMaxPanelTiles && 2 * tiles * kTile<A> * p.writers * int64_t(sizeof(A)) <= kPanelBytes) tiles *= 2;
  return tiles;
}

// Two panels, and copies for the edge.
template <class S, class A = typename Traits<S>::Accumulate>
int64_t read_scratch(const ReadParams& p) {
  if (p.readers <= kFewReaders) return p.readers * kFewColumns * sizeof(A);
  return kTile<A> * (2 * most_panel_tiles<S>(p) * p.writers * sizeof(A) + (1 + p.readers) * sizeof(S));
}

template <class S, class A = typename Traits<S>::Accumulate>
void read_range(const ReadParams& p, const void* panels, void* scratch, int64_t begin, int64_t end) {
  const A* z = static_cast<const A*>(panels);
  if (p.readers <= kFewReaders) return read_few_range<S>(p, z, static_cast<A*>(scratch), begin, end);
  const S* stream = static_cast<const S*>(p.stream);
  const S* base = static_cast<const S*>(p.base);
  S* reads = static_cast<S*>(p.reads);
  const int64_t most = most_panel_tiles<S>(p), tile_size = p.writers * kTile<A>;
  const int64_t some = (end - begin) / kTile<A> / kPanelsPerRange, tiles = some < 1 ? 1 : some < most ? some : most;
  A *packed = static_cast<A*>(scratch), *other = packed + most * tile_size;
  S* const copies = reinterpret_cast<S*>(other + most * tile_size);
  const auto copy_from = [&](int64_t first, A* to) {
    const int64_t whole = (end - first) / kTile<A>;
    return whole > 0 ? PanelCopy<S>(stream + first, p.stream_stride, p.writers, whole < tiles ? whole : tiles, to)
                     : PanelCopy<S>();
  };
  const bool around = goes_around_cache(reads, p.readers, p.reads_stride * int64_t(sizeof(S)));
  const auto tile = around ? read_tile_all<S, true> : read_tile_all<S, false>;
  copy_from(begin, packed).finish();
  while (begin + kTile<A> <= end) {
    const int64_t next = begin + tiles * kTile<A>;
    PanelCopy<S> copy = next < end ? copy_from(next, other) : PanelCopy<S>();
    for (const A* part = packed; begin < next && begin + kTile<A> <= end; begin += kTile<A>, part += tile_size)
      tile(p, z, part, base ? base + begin : nullptr, reads + begin, p.reads_stride, copy);
    copy.finish();
    A* const done = packed;
    packed = other, other = done;
  }
  finish_stores_around_cache();
  if (begin < end) read_edge<S>(p, z, packed, copies, begin, end - begin);
}

}  // namespace FC_ISA
}  // namespace fastcircuit
