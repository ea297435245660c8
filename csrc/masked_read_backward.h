// The backward kernel: for each tile of columns, every block of writers takes both products while its rows are in
// cache, so grad_reads, the stream and grad_stream are each moved once.
#pragma once

#include "masked_read_forward.h"
#include "prefetch.h"

namespace fastcircuit {
namespace FC_ISA {

#if FC_VECTOR_BYTES == 64
constexpr int kDotReaders = 4, kDotWriters = 6;
#elif FC_VECTOR_BYTES == 32
constexpr int kDotReaders = 4, kDotWriters = 3;
#else
constexpr int kDotReaders = 2, kDotWriters = 4;
#endif

// Columns of a tile: wide enough that summing lanes at its end is cheap, narrow enough that grad_reads stays near.
template <class S, class A = typename Traits<S>::Accumulate>
int64_t wide_tile(int64_t readers) {
  int64_t tiles = 4;
  while (tiles < 32 && GradReads<S>::bytes(readers, 2 * tiles * kTile<A>) <= GradReads<S>::kMostBytes) tiles *= 2;
  return tiles * kTile<A>;
}

// g[Rows, kTile] (+)= z[steps, Rows]^T x[steps, kTile]
template <class S, class G, int Rows, class F = typename Products<S>::Factor, class A = typename Products<S>::A>
FC_INLINE void grad_tile(const F* z, const F* x, int64_t steps, typename Products<S>::Parts parts, G* g, int64_t stride,
                         bool accumulate, Prefetch& prefetch) {
  Vec<A> acc[Rows][kVecs];
  for (int i = 0; i < Rows; ++i)
    for (int v = 0; v < kVecs; ++v)
      acc[i][v] = Vec<A>{};
  Prefetch ahead = prefetch;
  for (int64_t left = steps; left > 0; --left) {
    ahead.step();
    add_tile_products<S, Rows>(acc, z, x, 1, parts);
  }
  prefetch = ahead;
  for (int i = 0; i < Rows; ++i) {
    G* const to = g + i * stride;
    for (int v = 0; accumulate && v < kVecs; ++v) acc[i][v] += Traits<G>::load(to + v * Simd<A>::kLanes);
    store_tile_row<false>(to, acc[i]);
  }
}

template <class S, class G, int Rows = kRows, class F = typename Products<S>::Factor>
FC_INLINE void grad_tile_rows(int64_t rows, const F* z, const F* x, int64_t steps, typename Products<S>::Parts parts,
                              G* g, int64_t stride, bool accumulate, Prefetch& prefetch) {
  if (rows == Rows) {
    grad_tile<S, G, Rows>(z, x, steps, parts, g, stride, accumulate, prefetch);
  } else if constexpr (Rows > 1) {
    grad_tile_rows<S, G, Rows - 1>(rows, z, x, steps, parts, g, stride, accumulate, prefetch);
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

// sums[Readers, Writers] += <x_i, d_j> over `tiles` tiles.
template <class S, int Readers, int Writers, class X = typename Products<S>::Dot>
FC_INLINE void dot_block(const X* x, int64_t readers, const S* d, int64_t stride, int64_t tiles, double* sums,
                         Prefetch& prefetch) {
  using A = typename Products<S>::A;
  using Factor = typename Products<S>::Factor;
  constexpr int kPairs = Readers * Writers, kDotLanes = Products<S>::kDotLanes, kDotTile = Products<S>::kDotTile;
  const S* rows[Writers];
  for (int j = 0; j < Writers; ++j) rows[j] = d + j * stride;
  Vec<A> acc[Readers][Writers];
  for (int i = 0; i < Readers; ++i)
    for (int j = 0; j < Writers; ++j) acc[i][j] = Vec<A>{};
  Prefetch ahead = prefetch;
  for (int64_t t = 0; t < tiles; ++t) {
#pragma GCC unroll 1
    for (int c = 0; c < kDotTile; c += kDotLanes) {
      ahead.step();
      Vec<Factor> xi[Readers];
      for (int i = 0; i < Readers; ++i) xi[i] = Products<S>::load_dot(x + (t * readers + i) * kDotTile + c);
      for (int j = 0; j < Writers; ++j) {
        const Vec<Factor> dj = Products<S>::load_row(rows[j] + t * kDotTile + c);
        for (int i = 0; i < Readers; ++i) Products<S>::add(acc[i][j], xi[i], dj);
      }
    }
  }
  prefetch = ahead;
  A total[kPairs + Simd<A>::kLanes];
  sum_accumulators<A, kPairs>(&acc[0][0], total);
  for (int i = 0; i < kPairs; ++i) sums[i] += total[i];
}

// sums[readers, writers] += <x_r, d_w> for a block of at most kDotWriters writers, by groups of readers.
template <class S, int Writers = kDotWriters, class X = typename Products<S>::Dot>
void dot_rows(int64_t writers, const X* x, int64_t readers, const S* d, int64_t stride, int64_t tiles, double* sums,
              Prefetch& next_d, Prefetch& next_x) {
  if (writers == Writers) {
    int64_t r = 0;
    for (; r + kDotReaders <= readers; r += kDotReaders)
      dot_block<S, kDotReaders, Writers>(x + r * Products<S>::kDotTile, readers, d, stride, tiles, sums + r * Writers,
                                         next_d.done() ? next_x : next_d);
    for (; r < readers; ++r)
      dot_block<S, 1, Writers>(x + r * Products<S>::kDotTile, readers, d, stride, tiles, sums + r * Writers,
                               next_d.done() ? next_x : next_d);
  } else if constexpr (Writers > 1) {
    dot_rows<S, Writers - 1>(writers, x, readers, d, stride, tiles, sums, next_d, next_x);
  }
}

template <class S, class G>
struct Backward {
  using A = typename Products<S>::A;
  using F = typename Products<S>::Factor;

  // Sums, grad_reads of a panel, and copies for the edge.
  static int64_t scratch(const BackwardParams& p) {
    const int64_t step = wide_tile<S>(p.readers), copies = kRows * step * int64_t(sizeof(S) + sizeof(G));
    return sums_size(p) * int64_t(sizeof(double)) + GradReads<S>::bytes(p.readers, step) + copies;
  }

  static void range(const BackwardParams& p, const void* panels, void* scratch, double* grad_mask, int64_t begin,
                    int64_t end) {
    const int64_t step = wide_tile<S>(p.readers);
    double* const sums = static_cast<double*>(scratch);
    GradReads<S> x(p, sums + sums_size(p), step);
    char* const copies = reinterpret_cast<char*>(sums + sums_size(p)) + GradReads<S>::bytes(p.readers, step);
    const int64_t row_factors = Products<S>::steps(p.readers) * typename Products<S>::Parts(p.mask_parts);
    const RowBlocks blocks(p.writers, kRows);
    std::memset(sums, 0, sizeof(double) * p.readers * p.writers);
    for (; begin < end; begin += step) {
      const int64_t width = end - begin < step ? end - begin : step, after = begin + step;
      const int64_t next_width = end < after ? 0 : end - after < step ? end - after : step;
      x.pack(begin, width);
      Prefetch next_x(static_cast<const S*>(p.grad_reads) + after, p.grad_reads_stride, p.readers, next_width);
      for (int64_t i = 0; i < blocks.count; ++i) {
        const int64_t w = blocks.begin(i), rows = blocks.rows(i);
        const F* z = static_cast<const F*>(panels) + w * row_factors;
        const S* d = static_cast<const S*>(p.stream) + w * p.stream_stride + begin;
        G* g = p.grad_stream ? static_cast<G*>(p.grad_stream) + w * p.grad_stream_stride + begin : nullptr;
        double* block_sums = grad_mask ? sums + w * p.readers : nullptr;
        if (width % kTile<A> != 0) {
          edge_block(p, z, x, d, g, rows, width, block_sums, copies);
          continue;
        }
        // Next is the block below, or after the last one the first of the next panel.
        const bool below = i + 1 < blocks.count;
        const int64_t next = below ? i + 1 : 0, column = below ? 0 : step, down = blocks.begin(next) - w;
        const int64_t next_columns = below ? width : next_width;
        Prefetch next_d(d + down * p.stream_stride + column, p.stream_stride, blocks.rows(next), next_columns);
        Prefetch next_g;
        if (g)
          next_g = {g + down * p.grad_stream_stride + column, p.grad_stream_stride, blocks.rows(next), next_columns};
        block(p, z, x, d, p.stream_stride, g, p.grad_stream_stride, rows, width / kTile<A>, block_sums, next_d, next_g,
              next_x);
      }
    }
    if (grad_mask) add_sums(p, sums, grad_mask);
  }

 private:
  static int64_t sums_size(const BackwardParams& p) {
    return (p.readers * p.writers + Simd<double>::kLanes - 1) / Simd<double>::kLanes * Simd<double>::kLanes;
  }

  // `tiles` whole tiles of one block of writers.
  static void block(const BackwardParams& p, const F* z, const GradReads<S>& x, const S* d, int64_t d_stride, G* g,
                    int64_t g_stride, int64_t rows, int64_t tiles, double* sums, Prefetch& next_d, Prefetch& next_g,
                    Prefetch& next_x) {
    const RowBlocks groups(rows, kDotWriters);
    const int64_t dot_tiles = tiles * (kTile<A> / Products<S>::kDotTile);
    for (int64_t i = 0; sums && i < groups.count; ++i)
      dot_rows<S>(groups.rows(i), x.dots(), p.readers, d + groups.begin(i) * d_stride, d_stride, dot_tiles,
                  sums + groups.begin(i) * p.readers, next_d, next_x);
    const typename Products<S>::Parts parts(p.mask_parts);
    for (int64_t t = 0; g && t < tiles; ++t)
      grad_tile_rows<S>(rows, z, x.factors(t), Products<S>::steps(p.readers), parts, g + t * kTile<A>, g_stride,
                        p.accumulate, next_g);
  }

  // A tile whose width is not a multiple of kTile goes through copies that are.
  static void edge_block(const BackwardParams& p, const F* z, const GradReads<S>& x, const S* d, G* g, int64_t rows,
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
    block(p, z, x, d_copy, wide, g ? g_copy : nullptr, wide, rows, tiles, sums, nothing, nothing, nothing);
    for (int64_t j = 0; g && j < rows; ++j)
      std::memcpy(g + j * p.grad_stream_stride, g_copy + j * wide, sizeof(G) * width);
  }

  // From the order of the blocks to [reader, writer].
  static void add_sums(const BackwardParams& p, const double* sums, double* grad_mask) {
    const RowBlocks blocks(p.writers, kRows);
    for (int64_t i = 0; i < blocks.count; ++i) {
      const RowBlocks groups(blocks.rows(i), kDotWriters);
      for (int64_t k = 0; k < groups.count; ++k) {
        double* to = grad_mask + blocks.begin(i) + groups.begin(k);
        for (int64_t r = 0; r < p.readers; ++r, to += p.writers)
          for (int64_t j = 0; j < groups.rows(k); ++j) to[j] += *sums++;
      }
    }
  }
};

}  // namespace FC_ISA
}  // namespace fastcircuit
