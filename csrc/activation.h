// The activations of an MLP and their slopes, a register at a time. All come from one exponential, of a number that is
// not above 0: nothing overflows, and no digits are lost where the result is close to 0.
#pragma once

#include "exponential.h"
#include "mlp.h"

namespace fastcircuit {
namespace FC_ISA {

template <class A>
struct Activated {
  Vec<A> value, slope;
};

// 1 / (1 + exp(-x)), and 1 minus that.
template <class A>
FC_INLINE void sigmoid(Vec<A> x, Vec<A>& result, Vec<A>& rest) {
  const Vec<A> below = exp_of(x < A(0) ? x : -x), larger = A(1) / (below + A(1)), smaller = below * larger;
  result = x < A(0) ? smaller : larger;
  rest = x < A(0) ? larger : smaller;
}

// The polynomial with these coefficients, the constant one first.
template <class A, int N>
FC_INLINE Vec<A> polynomial(const A (&c)[N], Vec<A> x) {
  Vec<A> y = splat(c[N - 1]);
  for (int i = N - 2; i >= 0; --i) y = y * x + c[i];
  return y;
}

// The normal distribution function. In the middle 1/2 + x P(x^2); beyond, exp(-x^2 / 2) y Q(y) with y = 1 / (1 + |x| / 2)
// is the smaller tail. Fitted to errors of at most 1e-10 and, relatively, 4e-9.
FC_INLINE Vec<float> normal_cdf(Vec<float> x, Vec<float> bell) {
  constexpr float kMiddle[] = {0.39894229f,     -0.066490382f,   0.009973540f,    -0.0011872694f,
                               1.1533177e-04f, -9.3456674e-06f, 6.1211210e-07f, -2.5232021e-08f};
  constexpr float kTail[] = {0.19947638f, 0.19929463f, 0.15213102f, 0.029816674f,
                             0.03362564f, -0.39163652f, 0.4228918f, -0.14722189f};
  const Vec<float> size = x < 0.0f ? -x : x, y = 1.0f / (size * 0.5f + 1.0f);
  const Vec<float> middle = x * polynomial(kMiddle, x * x) + 0.5f, tail = bell * (y * polynomial(kTail, y));
  return size < 1.5f ? middle : x < 0.0f ? tail : 1.0f - tail;
}

FC_INLINE Vec<double> normal_cdf(Vec<double> x, Vec<double>) {
  for (int i = 0; i < Simd<double>::kLanes; ++i) x[i] = 0.5 * __builtin_erfc(-0.70710678118654752440 * x[i]);
  return x;
}

template <Activation kind, class A>
FC_INLINE Activated<A> activated(Vec<A> x) {
  if constexpr (kind == Activation::relu) {
    return {x < A(0) ? Vec<A>{} : x, x <= A(0) ? Vec<A>{} : splat(A(1))};
  } else if constexpr (kind == Activation::gelu) {
    const Vec<A> bell = exp_of(x * x * A(-0.5)), below = normal_cdf(x, bell);
    return {x * below, below + x * (bell * A(0.39894228040143267794))};
  } else {
    Vec<A> y = x, slope = splat(A(1)), s, rest;
    if constexpr (kind == Activation::gelu_tanh) {  // (1 + tanh(y / 2)) / 2 is the sigmoid of y
      constexpr A kScale = A(1.59576912160573071176), kCubic = A(0.044715);
      y = x * ((x * x * kCubic + A(1)) * kScale);
      slope = (x * x * (3 * kCubic) + A(1)) * kScale;
    }
    sigmoid<A>(y, s, rest);
    return {x * s, s * (x * rest * slope + A(1))};
  }
}

}  // namespace FC_ISA
}  // namespace fastcircuit
