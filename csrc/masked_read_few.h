// The forward kernel for one or two readers (an MLP, the last read): nothing to reuse, so the rows are streamed in
// runs that memory likes, four at a time, into sums that stay in the first-level cache.
#pragma once

#include "simd.h"

namespace fastcircuit {
namespace FC_ISA {

constexpr int64_t kFewReaders = 2, kFewColumns = 2048;
constexpr int kFewWriters = 4;

// sums[Readers, kFewColumns] += z[Writers, Readers]^T rows[Writers, width]
template <class S, int Readers, int Writers, class A = typename Traits<S>::Accumulate>
void add_rows(const A* z, const S* rows, int64_t stride, bool more, int64_t width, A* sums) {
  constexpr int kLanes = Simd<A>::kLanes;
  for (int64_t c = 0; c < width; c += kLanes) {
    Vec<A> acc[Readers];
    for (int i = 0; i < Readers; ++i) acc[i] = Traits<A>::load(sums + i * kFewColumns + c);
    for (int j = 0; j < Writers; ++j) {
      if (more) __builtin_prefetch(rows + (Writers + j) * stride + c, 0, 2);
      const Vec<A> d = load_some(rows + j * stride + c, width - c);
      for (int i = 0; i < Readers; ++i) acc[i] += splat(z[j * Readers + i]) * d;
    }
    for (int i = 0; i < Readers; ++i) Traits<A>::store(sums + i * kFewColumns + c, acc[i]);
  }
}

template <class S, int Readers, class A = typename Traits<S>::Accumulate>
void read_few(const ReadParams& p, const A* z, A* sums, int64_t begin, int64_t end) {
  constexpr int kLanes = Simd<A>::kLanes;
  for (; begin < end; begin += kFewColumns) {
    const int64_t width = end - begin < kFewColumns ? end - begin : kFewColumns;
    const S* rows = static_cast<const S*>(p.stream) + begin;
    const S* base = p.base ? static_cast<const S*>(p.base) + begin : nullptr;
    S* out = static_cast<S*>(p.reads) + begin;
    for (int64_t c = 0; c < width; c += kLanes)
      for (int i = 0; i < Readers; ++i)
        Traits<A>::store(sums + i * kFewColumns + c, base ? load_some(base + c, width - c) : Vec<A>{});
    int64_t w = 0;
    for (; w + kFewWriters <= p.writers; w += kFewWriters)
      add_rows<S, Readers, kFewWriters>(z + w * Readers, rows + w * p.stream_stride, p.stream_stride,
                                        w + 2 * kFewWriters <= p.writers, width, sums);
    for (; w < p.writers; ++w)
      add_rows<S, Readers, 1>(z + w * Readers, rows + w * p.stream_stride, p.stream_stride, false, width, sums);
    for (int i = 0; i < Readers; ++i)
      for (int64_t c = 0; c < width; c += kLanes)
        store_some(out + i * p.reads_stride + c, Traits<A>::load(sums + i * kFewColumns + c), width - c);
  }
}

template <class S, class A = typename Traits<S>::Accumulate>
void read_few_range(const ReadParams& p, const A* z, A* sums, int64_t begin, int64_t end) {
  return p.readers == 1 ? read_few<S, 1>(p, z, sums, begin, end) : read_few<S, 2>(p, z, sums, begin, end);
}

}  // namespace FC_ISA
}  // namespace fastcircuit
