// A matrix product whose right factor was packed first: c = a b for kRows rows of a at a time.
#pragma once

#include "prefetch.h"
#include "transpose.h"

namespace fastcircuit {
namespace FC_ISA {

// The right factor [inner, columns] as panels of kTile columns, [panel][inner][kTile]; the last one is as many
// registers wide as it needs, and zero beyond the last column.
template <class A>
struct Panels {
  static constexpr int kLanes = Simd<A>::kLanes;

  int64_t inner, columns;

  int64_t count() const { return (columns + kTile<A> - 1) / kTile<A>; }
  int64_t registers(int64_t panel) const {
    const int64_t left = (columns - panel * kTile<A> + kLanes - 1) / kLanes;
    return left < kVecs ? left : kVecs;
  }
  int64_t begin(int64_t panel) const { return panel * inner * kTile<A>; }
  int64_t size() const { return count() * inner * kTile<A>; }

  // b[i, j] lies at b + i * inner_stride + j * column_stride.
  void pack(const A* b, int64_t inner_stride, int64_t column_stride, A* packed) const {
    for (int64_t panel = 0; panel < count(); ++panel) {
      const int64_t first = panel * kTile<A>, wide = registers(panel) * kLanes;
      const int64_t width = columns - first < wide ? columns - first : wide;
      const A* from = b + first * column_stride;
      for (int64_t i = 0; i < inner; i += kBlock, from += kBlock * inner_stride, packed += kBlock * wide) {
        const int64_t rows = inner - i < kBlock ? inner - i : kBlock;
        if (column_stride == 1) {
          pack_rows(from, inner_stride, rows, width, wide, packed);
        } else {
          pack_columns(from, inner_stride, column_stride, rows, width, wide, packed);
        }
        if (rows < kBlock) packed -= (kBlock - rows) * wide;
      }
    }
  }

 private:
  // Rows at a time: what goes where fits the first-level cache when columns are what is contiguous in memory.
  static constexpr int64_t kBlock = 16;
  static constexpr int64_t kAhead = 2 * kBlock;  // rows from fetching to copying

  static void pack_rows(const A* from, int64_t stride, int64_t rows, int64_t width, int64_t wide, A* to) {
    for (int64_t i = 0; i < rows; ++i, from += stride, to += wide)
      for (int64_t j = 0; j < wide; j += kLanes) Traits<A>::store(to + j, load_some(from + j, width - j));
  }

  static void pack_columns(const A* from, int64_t stride, int64_t column_stride, int64_t rows, int64_t width,
                           int64_t wide, A* to) {
    for (int64_t j = 0; j < width; ++j) __builtin_prefetch(from + kAhead * stride + j * column_stride);
    if (stride == 1) {
      transpose(from, column_stride, width, rows, to, wide);
    } else {
      for (int64_t j = 0; j < width; ++j)
        for (int64_t i = 0; i < rows; ++i) to[i * wide + j] = from[i * stride + j * column_stride];
    }
    for (int64_t j = width; j < wide; ++j)
      for (int64_t i = 0; i < rows; ++i) to[i * wide + j] = A(0);
  }
};

// acc[kRows, V registers] += a[kRows, inner] b[inner, V registers]
template <int V, class A>
FC_INLINE void multiply_panel(const A* a, int64_t a_stride, const A* b, int64_t inner, Vec<A> (&acc)[kRows][V],
                              Prefetch& prefetch) {
  constexpr int kLanes = Simd<A>::kLanes;
  Prefetch ahead = prefetch;
  for (int64_t k = 0; k < inner; ++k, b += V * kLanes) {
    ahead.step();
    Vec<A> row[V];
    for (int v = 0; v < V; ++v) row[v] = Traits<A>::load(b + v * kLanes);
    for (int i = 0; i < kRows; ++i) {
      const Vec<A> ai = splat(a[i * a_stride + k]);
      for (int v = 0; v < V; ++v) acc[i][v] += ai * row[v];
    }
  }
  prefetch = ahead;
}

// What a product is added to: one row for all of c (stride 0), or as many as c has, which may be c; null: zero.
template <class A>
struct Start {
  const A* data = nullptr;
  int64_t stride = 0;

  Start from(int64_t column) const { return {data ? data + column : nullptr, stride}; }

  FC_INLINE Vec<A> add(Vec<A> sum, int64_t row, int64_t column, int64_t width) const {
    return data ? sum + load_some(data + row * stride + column, width - column) : sum;
  }
};

// c[kRows, columns] = start + a[kRows, inner] b, with b packed; `rows` of c and `columns` are written.
template <int V, class A>
void multiply_one_panel(const A* a, int64_t a_stride, const A* b, int64_t inner, Start<A> start, int64_t rows,
                        int64_t width, A* c, int64_t c_stride, Prefetch& prefetch) {
  constexpr int kLanes = Simd<A>::kLanes;
  Vec<A> acc[kRows][V] = {};
  multiply_panel<V, A>(a, a_stride, b, inner, acc, prefetch);
  for (int i = 0; i < rows; ++i)
    for (int v = 0; v < V && v * kLanes < width; ++v)
      store_some(c + i * c_stride + v * kLanes, start.add(acc[i][v], i, v * kLanes, width), width - v * kLanes);
}

template <class A, int V = kVecs>
FC_INLINE void multiply_panels(const Panels<A>& panels, const A* a, int64_t a_stride, const A* packed, Start<A> start,
                               int64_t rows, A* c, int64_t c_stride, Prefetch& prefetch, int64_t panel) {
  if (panels.registers(panel) == V) {
    const int64_t first = panel * kTile<A>;
    multiply_one_panel<V, A>(a, a_stride, packed + panels.begin(panel), panels.inner, start.from(first), rows,
                             panels.columns - first, c + first, c_stride, prefetch);
  } else if constexpr (V > 1) {
    multiply_panels<A, V - 1>(panels, a, a_stride, packed, start, rows, c, c_stride, prefetch, panel);
  }
}

// All columns; a must be readable for kRows rows. What is needed next is fetched on the way.
template <class A>
void multiply(const Panels<A>& panels, const A* a, int64_t a_stride, const A* packed, Start<A> start, int64_t rows,
              A* c, int64_t c_stride, Prefetch& prefetch) {
  for (int64_t panel = 0; panel < panels.count(); ++panel)
    multiply_panels<A>(panels, a, a_stride, packed, start, rows, c, c_stride, prefetch, panel);
}

}  // namespace FC_ISA
}  // namespace fastcircuit
