// The forward kernel: tiles of kTile columns; the stream is read from memory once, by the first block of readers,
// which leaves it packed for the others. Packing also undoes the power-of-two row stride that would otherwise
// send every row of a tile to the same few cache sets.
#pragma once

#include "masked_read_few.h"
#include "prefetch.h"

namespace fastcircuit {
namespace FC_ISA {

constexpr int64_t kMaxPanelTiles = 16, kPanelBytes = 512 * 1024;
// Reads larger than this do not stay in cache anyway, so they are written around it.
constexpr int64_t kStreamingBytes = 4 << 20;

// out[Rows, kTile] = base + z[W, Rows]^T rows[W, kTile]; with Pack the rows are also copied to `packed`.
template <class S, int Rows, bool Pack, bool Around, class A = typename Traits<S>::Accumulate>
FC_INLINE void read_tile(const A* z, const S* rows, int64_t stride, A* packed, int64_t writers, const S* base, S* out,
                         int64_t out_stride, Prefetch& prefetch) {
  constexpr int kLanes = Simd<A>::kLanes;
  Vec<A> acc[Rows][kVecs];
  for (int v = 0; v < kVecs; ++v) {
    const Vec<A> start = base ? Traits<S>::load(base + v * kLanes) : Vec<A>{};
    for (int i = 0; i < Rows; ++i) acc[i][v] = start;
  }
  Prefetch ahead = prefetch;
  for (int64_t w = 0; w < writers; ++w) {
    ahead.step();
    Vec<A> d[kVecs];
    for (int v = 0; v < kVecs; ++v) {
      if constexpr (Pack) {
        d[v] = Traits<S>::load(rows + v * kLanes);
        Traits<A>::store(packed + v * kLanes, d[v]);
      } else {
        d[v] = Traits<A>::load(packed + v * kLanes);
      }
    }
    for (int i = 0; i < Rows; ++i) {
      const Vec<A> zi = splat(z[i]);
      for (int v = 0; v < kVecs; ++v) acc[i][v] += zi * d[v];
    }
    z += Rows;
    rows += stride;
    packed += kTile<A>;
  }
  prefetch = ahead;
  for (int i = 0; i < Rows; ++i)
    for (int v = 0; v < kVecs; ++v) {
      if constexpr (Around) {
        Traits<S>::store_around_cache(out + i * out_stride + v * kLanes, acc[i][v]);
      } else {
        Traits<S>::store(out + i * out_stride + v * kLanes, acc[i][v]);
      }
    }
}

template <class S, bool Pack, bool Around, int Rows = kRows, class A = typename Traits<S>::Accumulate>
FC_INLINE void read_tile_rows(int64_t rows, const A* z, const S* stream, int64_t stride, A* packed, int64_t writers,
                              const S* base, S* out, int64_t out_stride, Prefetch& prefetch) {
  if (rows == Rows) {
    read_tile<S, Rows, Pack, Around>(z, stream, stride, packed, writers, base, out, out_stride, prefetch);
  } else if constexpr (Rows > 1) {
    read_tile_rows<S, Pack, Around, Rows - 1>(rows, z, stream, stride, packed, writers, base, out, out_stride,
                                              prefetch);
  }
}

// One tile for all readers. `base` and the rows of `stream` must be readable for a whole tile.
template <class S, bool Around, class A = typename Traits<S>::Accumulate>
void read_tile_all(const ReadParams& p, const A* panels, A* packed, const S* stream, int64_t stride, const S* base,
                   S* out, int64_t out_stride, Prefetch& prefetch) {
  const RowBlocks blocks(p.readers, kRows);
  for (int64_t block = 0; block < blocks.count; ++block) {
    const int64_t r = blocks.begin(block), rows = blocks.rows(block);
    const A* z = panels + r * p.writers;
    if (r == 0) {
      read_tile_rows<S, true, Around>(rows, z, stream, stride, packed, p.writers, base, out, out_stride, prefetch);
    } else {
      read_tile_rows<S, false, Around>(rows, z, stream, stride, packed, p.writers, base, out + r * out_stride,
                                       out_stride, prefetch);
    }
  }
}

// A last tile narrower than kTile goes through copies that are a whole tile wide.
template <class S, class A = typename Traits<S>::Accumulate>
void read_tail(const ReadParams& p, const A* panels, A* packed, char* scratch, int64_t begin, int64_t width) {
  constexpr int64_t kWide = kTile<A>;
  S* rows = reinterpret_cast<S*>(scratch);
  S* base = rows + p.writers * kWide;
  S* out = base + kWide;
  const S* stream = static_cast<const S*>(p.stream) + begin;
  std::memset(rows, 0, sizeof(S) * (p.writers + 1) * kWide);
  for (int64_t w = 0; w < p.writers; ++w)
    std::memcpy(rows + w * kWide, stream + w * p.stream_stride, sizeof(S) * width);
  if (p.base) std::memcpy(base, static_cast<const S*>(p.base) + begin, sizeof(S) * width);
  Prefetch nothing;
  read_tile_all<S, false>(p, panels, packed, rows, kWide, base, out, kWide, nothing);
  for (int64_t r = 0; r < p.readers; ++r)
    std::memcpy(static_cast<S*>(p.reads) + r * p.reads_stride + begin, out + r * kWide, sizeof(S) * width);
}

template <class S, class A = typename Traits<S>::Accumulate>
int64_t read_scratch(const ReadParams& p) {
  if (p.readers <= kFewReaders) return p.readers * kFewColumns * sizeof(A);
  return kTile<A> * (p.writers * sizeof(A) + (p.writers + 1 + p.readers) * sizeof(S));
}

template <class S, class A = typename Traits<S>::Accumulate>
int64_t panel_tiles(const ReadParams& p) {
  int64_t tiles = 1;
  while (tiles < kMaxPanelTiles && 2 * tiles * kTile<A> * p.writers * int64_t(sizeof(S)) <= kPanelBytes) tiles *= 2;
  return tiles;
}

template <class S>
bool writes_around_cache(const ReadParams& p) {
  const int64_t row_bytes = p.reads_stride * int64_t(sizeof(S));
  return p.readers * row_bytes >= kStreamingBytes && row_bytes % kBytes == 0 &&
         reinterpret_cast<uintptr_t>(p.reads) % kBytes == 0;
}

template <class S, class A = typename Traits<S>::Accumulate>
void read_range(const ReadParams& p, const void* panels, void* scratch, int64_t begin, int64_t end) {
  A* packed = static_cast<A*>(scratch);
  const A* z = static_cast<const A*>(panels);
  const S* stream = static_cast<const S*>(p.stream);
  const S* base = static_cast<const S*>(p.base);
  S* reads = static_cast<S*>(p.reads);
  if (p.readers <= kFewReaders) return read_few_range<S>(p, z, packed, begin, end);
  const int64_t tiles = panel_tiles<S>(p);
  const auto tile = writes_around_cache<S>(p) ? read_tile_all<S, true> : read_tile_all<S, false>;
  while (begin + kTile<A> <= end) {
    const int64_t next = begin + tiles * kTile<A>;
    Prefetch prefetch(stream + next, p.stream_stride, p.writers, next < end ? tiles * kTile<A> : 0);
    for (; begin < next && begin + kTile<A> <= end; begin += kTile<A>)
      tile(p, z, packed, stream + begin, p.stream_stride, base ? base + begin : nullptr, reads + begin,
           p.reads_stride, prefetch);
  }
  finish_stores_around_cache();
  if (begin < end)
    read_tail<S>(p, z, packed, reinterpret_cast<char*>(packed + p.writers * kTile<A>), begin, end - begin);
}

}  // namespace FC_ISA
}  // namespace fastcircuit
