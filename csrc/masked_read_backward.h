// The backward kernel: for each tile of columns, every block of writers takes both products while its rows are in
// cache, so grad_reads, the stream and grad_stream are each moved once.
#pragma once

#include "masked_read_forward.h"

namespace fastcircuit {
namespace FC_ISA {

#if FC_VECTOR_BYTES == 64
constexpr int kDotReaders = 4, kDotWriters = 6;
#elif FC_VECTOR_BYTES == 32
constexpr int kDotReaders = 4, kDotWriters = 3;
#else
constexpr int kDotReaders = 2, kDotWriters = 4;
#endif

constexpr int64_t kGradReadsBytes = 192 * 1024;

// Columns of a tile: wide enough that summing lanes at its end is cheap, narrow enough that grad_reads stays near.
template <class A>
int64_t wide_tile(int64_t readers) {
  int64_t tiles = 4;
  while (tiles < 32 && 2 * tiles * kTile<A> * readers * int64_t(sizeof(A)) <= kGradReadsBytes) tiles *= 2;
  return tiles * kTile<A>;
}

// g[Rows, kTile] (+)= z[R, Rows]^T x[R, kTile]
template <class G, int Rows, class A = typename Traits<G>::Accumulate>
FC_INLINE void grad_tile(const A* z, const A* x, int64_t readers, G* g, int64_t stride, bool accumulate, Prefetch& prefetch) {
  constexpr int kLanes = Simd<A>::kLanes;
  Vec<A> acc[Rows][kVecs];
  for (int i = 0; i < Rows; ++i)
    for (int v = 0; v < kVecs; ++v)
      acc[i][v] = accumulate ? Traits<G>::load(g + i * stride + v * kLanes) : Vec<A>{};
  Prefetch ahead = prefetch;
  for (int64_t r = 0; r < readers; ++r) {
    ahead.step();
    Vec<A> d[kVecs];
    for (int v = 0; v < kVecs; ++v) d[v] = Traits<A>::load(x + r * kTile<A> + v * kLanes);
    for (int i = 0; i < Rows; ++i) {
      const Vec<A> zi = splat(z[r * Rows + i]);
      for (int v = 0; v < kVecs; ++v) acc[i][v] += zi * d[v];
    }
  }
  prefetch = ahead;
  for (int i = 0; i < Rows; ++i)
    for (int v = 0; v < kVecs; ++v) Traits<G>::store(g + i * stride + v * kLanes, acc[i][v]);
}

template <class G, int Rows = kRows, class A = typename Traits<G>::Accumulate>
FC_INLINE void grad_tile_rows(int64_t rows, const A* z, const A* x, int64_t readers, G* g, int64_t stride,
                              bool accumulate, Prefetch& prefetch) {
  if (rows == Rows) {
    grad_tile<G, Rows>(z, x, readers, g, stride, accumulate, prefetch);
  } else if constexpr (Rows > 1) {
    grad_tile_rows<G, Rows - 1>(rows, z, x, readers, g, stride, accumulate, prefetch);
  }
}

// total[i] = the sum of the lanes of acc[i].
template <class A, int N>
FC_INLINE void sum_accumulators(Vec<A>* acc, A* total) {
  constexpr int kLanes = Simd<A>::kLanes;
#ifdef FC_SHUFFLES
  sum_lanes_of_all<A, N>(acc);
  for (int i = 0; i * kLanes < N; ++i) Traits<A>::store(total + i * kLanes, acc[i]);
#else
  for (int i = 0; i < N; ++i) total[i] = sum_lanes<A, kLanes>(acc[i]);
#endif
}

// sums[r * sums_stride + w] += <x_r, d_w> over `tiles` tiles, for Readers x kDotWriters pairs at once. Only the
// first `writers` of them are kept; the others repeat a row that exists.
template <class S, int Readers, class A = typename Traits<S>::Accumulate>
FC_INLINE void dot_block(const A* x, int64_t readers, const S* d, int64_t stride, int64_t writers, int64_t tiles,
                         double* sums, int64_t sums_stride, Prefetch& prefetch) {
  constexpr int kLanes = Simd<A>::kLanes;
  const S* rows[kDotWriters];
  for (int j = 0; j < kDotWriters; ++j) rows[j] = d + (j < writers ? j : 0) * stride;
  Vec<A> acc[Readers][kDotWriters];
  for (int i = 0; i < Readers; ++i)
    for (int j = 0; j < kDotWriters; ++j) acc[i][j] = Vec<A>{};
  Prefetch ahead = prefetch;
  for (int64_t t = 0; t < tiles; ++t) {
#pragma GCC unroll 1
    for (int v = 0; v < kVecs; ++v) {
      ahead.step();
      Vec<A> xi[Readers];
      for (int i = 0; i < Readers; ++i) xi[i] = Traits<A>::load(x + (t * readers + i) * kTile<A> + v * kLanes);
      for (int j = 0; j < kDotWriters; ++j) {
        const Vec<A> dj = Traits<S>::load(rows[j] + t * kTile<A> + v * kLanes);
        for (int i = 0; i < Readers; ++i) acc[i][j] += xi[i] * dj;
      }
    }
  }
  prefetch = ahead;
  A total[(Readers * kDotWriters + kLanes - 1) / kLanes * kLanes];
  sum_accumulators<A, Readers * kDotWriters>(&acc[0][0], total);
  for (int i = 0; i < Readers; ++i)
    for (int64_t j = 0; j < writers; ++j) sums[i * sums_stride + j] += total[i * kDotWriters + j];
}

template <class S, class A = typename Traits<S>::Accumulate>
void dot_rows(const A* x, int64_t readers, const S* d, int64_t stride, int64_t writers, int64_t tiles, double* sums,
              int64_t sums_stride, Prefetch& prefetch) {
  int64_t r = 0;
  for (; r + kDotReaders <= readers; r += kDotReaders)
    dot_block<S, kDotReaders>(x + r * kTile<A>, readers, d, stride, writers, tiles, sums + r * sums_stride,
                              sums_stride, prefetch);
  for (; r < readers; ++r)
    dot_block<S, 1>(x + r * kTile<A>, readers, d, stride, writers, tiles, sums + r * sums_stride, sums_stride,
                      prefetch);
}

// Copies columns [begin, begin + width) of grad_reads to packed[tile][reader][kTile], zero beyond width.
template <class S, class A = typename Traits<S>::Accumulate>
void pack_grad_reads(const BackwardParams& p, A* packed, int64_t begin, int64_t width) {
  constexpr int kLanes = Simd<A>::kLanes;
  const S* x = static_cast<const S*>(p.grad_reads) + begin;
  for (int64_t r = 0; r < p.readers; ++r) {
    for (int64_t c = 0; c < width; c += kLanes) {
      A* to = packed + ((c / kTile<A>)*p.readers + r) * kTile<A> + c % kTile<A>;
      S edge[kLanes] = {};
      const S* from = x + r * p.grad_reads_stride + c;
      if (width - c < kLanes) from = static_cast<const S*>(std::memcpy(edge, from, sizeof(S) * (width - c)));
      Traits<A>::store(to, Traits<S>::load(from));
    }
    for (int64_t c = (width + kLanes - 1) / kLanes * kLanes; c % kTile<A> != 0; c += kLanes)
      Traits<A>::store(packed + ((c / kTile<A>)*p.readers + r) * kTile<A> + c % kTile<A>, Vec<A>{});
  }
}

template <class S, class G, class A = typename Traits<S>::Accumulate>
struct Backward {
  static int64_t scratch(const BackwardParams& p) {
    return wide_tile<A>(p.readers) * (p.readers * sizeof(A) + kRows * (sizeof(S) + sizeof(G)));
  }

  // Fetches the next block of writers while this one is computed.
  template <class T>
  static Prefetch ahead(const T* next, int64_t stride, int64_t left, int64_t width) {
    const int64_t rows = left < kRows ? left : kRows;
    return next && left > 0 ? Prefetch(next, stride * int64_t(sizeof(T)), rows, width * int64_t(sizeof(T))) : Prefetch();
  }

  // `tiles` whole tiles of one block of writers.
  static void block(const BackwardParams& p, const A* z, const A* x, const S* d, int64_t d_stride, G* g,
                    int64_t g_stride, int64_t rows, int64_t tiles, double* sums, Prefetch& next_d, Prefetch& next_g) {
    if (sums)
      for (int64_t j = 0; j < rows; j += kDotWriters)
        dot_rows<S>(x, p.readers, d + j * d_stride, d_stride, rows - j < kDotWriters ? rows - j : kDotWriters, tiles,
                    sums + j, p.writers, next_d);
    if (g)
      for (int64_t t = 0; t < tiles; ++t)
        grad_tile_rows<G>(rows, z, x + t * p.readers * kTile<A>, p.readers, g + t * kTile<A>, g_stride, p.accumulate,
                          next_g);
  }

  // A tile whose width is not a multiple of kTile goes through copies that are.
  static void edge_block(const BackwardParams& p, const A* z, const A* x, const S* d, G* g, int64_t rows,
                         int64_t width, double* sums, char* scratch) {
    const int64_t tiles = (width + kTile<A> - 1) / kTile<A>, wide = tiles * kTile<A>;
    S* d_copy = reinterpret_cast<S*>(scratch);
    G* g_copy = reinterpret_cast<G*>(scratch + sizeof(S) * kRows * wide);
    std::memset(scratch, 0, (sizeof(S) + sizeof(G)) * kRows * wide);
    for (int64_t j = 0; j < rows; ++j) {
      std::memcpy(d_copy + j * wide, d + j * p.stream_stride, sizeof(S) * width);
      if (g && p.accumulate) std::memcpy(g_copy + j * wide, g + j * p.grad_stream_stride, sizeof(G) * width);
    }
    Prefetch nothing;
    block(p, z, x, d_copy, wide, g ? g_copy : nullptr, wide, rows, tiles, sums, nothing, nothing);
    if (g)
      for (int64_t j = 0; j < rows; ++j)
        std::memcpy(g + j * p.grad_stream_stride, g_copy + j * wide, sizeof(G) * width);
  }

  static void range(const BackwardParams& p, const void* panels, void* scratch, double* sums, int64_t begin,
                    int64_t end) {
    const int64_t step = wide_tile<A>(p.readers);
    A* x = static_cast<A*>(scratch);
    char* copies = reinterpret_cast<char*>(x + step * p.readers);
    for (; begin < end; begin += step) {
      const int64_t width = end - begin < step ? end - begin : step;
      pack_grad_reads<S>(p, x, begin, width);
      for (int64_t w = 0; w < p.writers; w += kRows) {
        const int64_t rows = p.writers - w < kRows ? p.writers - w : kRows;
        const A* z = static_cast<const A*>(panels) + w * p.readers;
        const S* d = static_cast<const S*>(p.stream) + w * p.stream_stride + begin;
        G* g = p.grad_stream ? static_cast<G*>(p.grad_stream) + w * p.grad_stream_stride + begin : nullptr;
        double* block_sums = sums ? sums + w : nullptr;
        if (width % kTile<A> == 0) {
          const int64_t left = p.writers - w - rows;
          Prefetch next_d = ahead(d + rows * p.stream_stride, p.stream_stride, left, width);
          Prefetch next_g = ahead(g ? g + rows * p.grad_stream_stride : nullptr, p.grad_stream_stride, left, width);
          block(p, z, x, d, p.stream_stride, g, p.grad_stream_stride, rows, width / kTile<A>, block_sums, next_d,
                next_g);
        } else {
          edge_block(p, z, x, d, g, rows, width, block_sums, copies);
        }
      }
    }
  }
};

}  // namespace FC_ISA
}  // namespace fastcircuit
