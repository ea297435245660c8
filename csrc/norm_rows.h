// One row of a norm and of its gradient. Each row is read twice, first for its sums and then, still in cache, for its
// results.
#pragma once

#include "simd.h"

// For lambdas, which take no `inline`.
#define FC_ALWAYS_INLINE __attribute__((always_inline))

namespace fastcircuit {
namespace FC_ISA {
namespace {

// Independent partial sums: enough of them to hide the latency of an addition.
constexpr int kParts = 4;

// The vectors of a row, the last one possibly narrower: beyond it are zeros, which add nothing to any sum.
template <class S, class A = typename Traits<S>::Accumulate>
FC_INLINE Vec<A> load(const S* p, int64_t lanes) {
  if (lanes == Simd<A>::kLanes) return Traits<S>::load(p);
  S edge[Simd<A>::kLanes] = {};
  std::memcpy(edge, p, sizeof(S) * lanes);
  return Traits<S>::load(edge);
}

template <class S, class A = typename Traits<S>::Accumulate>
FC_INLINE void store(S* p, Vec<A> v, int64_t lanes) {
  if (lanes == Simd<A>::kLanes) return Traits<S>::store(p, v);
  S edge[Simd<A>::kLanes];
  Traits<S>::store(edge, v);
  std::memcpy(p, edge, sizeof(S) * lanes);
}

// v as a store in S and a load would make it: bfloat16 is the upper half of a float, rounded to nearest even.
template <class S, class A = typename Traits<S>::Accumulate>
FC_INLINE Vec<A> rounded(Vec<A> v) {
  if constexpr (sizeof(S) == sizeof(A)) {
    return v;
  } else {
    using Wide = typename Traits<S>::Wide;
    const Wide bits = (Wide)v;
    const Vec<A> nearest = (Vec<A>)((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
    return v != v ? v : nearest;
  }
}

// Calls body(column, lanes, part) for every vector of a row.
template <class A, class Body>
FC_INLINE void for_vectors(int64_t width, const Body& body) {
  constexpr int kLanes = Simd<A>::kLanes;
  int64_t c = 0;
  for (; c + kParts * kLanes <= width; c += kParts * kLanes)
    for (int part = 0; part < kParts; ++part) body(c + part * kLanes, kLanes, part);
  for (; c + kLanes <= width; c += kLanes) body(c, kLanes, 0);
  if (c < width) body(c, width - c, 0);
}

// Adds the upper half to the lower one until one lane is left, all in registers: on short rows this is what counts.
template <class A, class V>
FC_INLINE A add_lanes(V v) {
  if constexpr (sizeof(V) == 2 * sizeof(A)) {
    return v[0] + v[1];
  } else {
    typedef A Half __attribute__((vector_size(sizeof(V) / 2)));
    Half low, high;
    std::memcpy(&low, &v, sizeof low);
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
    return add_lanes<A>(Half(low + high));
  }
}

template <class A>
FC_INLINE double total(const Vec<A> (&parts)[kParts]) {
  return add_lanes<A>((parts[0] + parts[1]) + (parts[2] + parts[3]));
}

FC_INLINE double inverse_root(double sum_of_squares, int64_t width, double eps) {
  return 1 / __builtin_sqrt(sum_of_squares / double(width) + eps);
}

// What LayerNorm takes from every number of a row before anything else.
template <class S, bool Centered, class A = typename Traits<S>::Accumulate>
FC_INLINE A mean_of(const S* x, int64_t width) {
  if constexpr (!Centered) return A(0);
  Vec<A> sums[kParts] = {};
  for_vectors<A>(width, [&](int64_t c, int64_t lanes, int part) FC_ALWAYS_INLINE { sums[part] += load(x + c, lanes); });
  return A(total<A>(sums) / double(width));
}

// x - mean; the lanes beyond the end of a row stay zero.
template <class S, bool Centered, class A = typename Traits<S>::Accumulate>
FC_INLINE Vec<A> centered(const S* x, int64_t lanes, A mean) {
  const Vec<A> v = load(x, lanes);
  if constexpr (!Centered) return v;
  const Vec<A> shifted = v - splat(mean);
  if (lanes == Simd<A>::kLanes) return shifted;
  A kept[Simd<A>::kLanes] = {};
  std::memcpy(kept, &shifted, sizeof(A) * lanes);
  return Traits<A>::load(kept);
}

// y = (x - mean) * rstd * weight + bias, over `width` numbers.
template <class S, bool Centered, class A = typename Traits<S>::Accumulate>
FC_INLINE void norm_row(const S* x, const S* weight, const S* bias, int64_t width, double eps, S* y) {
  const A mean = mean_of<S, Centered>(x, width);
  Vec<A> squares[kParts] = {};
  for_vectors<A>(width, [&](int64_t c, int64_t lanes, int part) FC_ALWAYS_INLINE {
    const Vec<A> xc = centered<S, Centered>(x + c, lanes, mean);
    squares[part] += xc * xc;
  });
  const Vec<A> rstd = splat(A(inverse_root(total<A>(squares), width, eps)));
  for_vectors<A>(width, [&](int64_t c, int64_t lanes, int) FC_ALWAYS_INLINE {
    const Vec<A> normed = centered<S, Centered>(x + c, lanes, mean) * rstd;
    // Hugging Face's RMSNorms round the normalised value to a half precision too; LayerNorm rounds once.
    Vec<A> yc = (Centered ? normed : rounded<S>(normed)) * load(weight + c, lanes);
    if (bias) yc += load(bias + c, lanes);
    store(y + c, yc, lanes);
  });
}

// grad_x = rstd * (g - mean(g) - xc * rstd^2 * mean(g * xc)) with g = grad * weight and xc = x - mean(x); RMSNorm is
// the same without the two means of x and g. Recomputing rstd is one more sum over numbers that are being read anyway.
// grad_x may be grad.
template <class S, bool Centered, class A = typename Traits<S>::Accumulate>
FC_INLINE void norm_backward_row(const S* grad, const S* x, const S* weight, int64_t width, double eps, S* grad_x) {
  const A mean = mean_of<S, Centered>(x, width);
  Vec<A> squares[kParts] = {}, products[kParts] = {}, sums[kParts] = {};
  for_vectors<A>(width, [&](int64_t c, int64_t lanes, int part) FC_ALWAYS_INLINE {
    const Vec<A> xc = centered<S, Centered>(x + c, lanes, mean);
    const Vec<A> g = load(grad + c, lanes) * load(weight + c, lanes);
    squares[part] += xc * xc;
    products[part] += g * xc;
    if constexpr (Centered) sums[part] += g;
  });
  const double inverse = inverse_root(total<A>(squares), width, eps);
  // In this order a tiny x, whose inverse is huge, does not overflow.
  const Vec<A> along_x = splat(A(total<A>(products) / double(width) * inverse * inverse));
  const Vec<A> rstd = splat(A(inverse)), mean_grad = splat(A(total<A>(sums) / double(width)));
  for_vectors<A>(width, [&](int64_t c, int64_t lanes, int) FC_ALWAYS_INLINE {
    Vec<A> g = load(grad + c, lanes) * load(weight + c, lanes);
    if constexpr (Centered) g -= mean_grad;
    store(grad_x + c, rstd * (g - centered<S, Centered>(x + c, lanes, mean) * along_x), lanes);
  });
}

}  // namespace
}  // namespace FC_ISA
}  // namespace fastcircuit
