// The exponential function of a register of numbers.
#pragma once

#include "simd.h"

namespace fastcircuit {
namespace FC_ISA {

// exp of numbers that are not above 0; NaN stays NaN. float: x = n ln 2 + r with |r| <= ln 2 / 2, and Taylor's
// polynomial of degree 7, whose next term is below a tenth of a unit in the last place.
FC_INLINE Vec<float> exp_of(Vec<float> x) {
  typedef int32_t Int __attribute__((vector_size(kBytes)));
  const Vec<float> lowest = splat(-87.0f);
  const Vec<float> above = x > lowest ? x : lowest;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vec<float> shifted = above * 1.44269504f + kRound;
  const Vec<float> n = shifted - kRound;
  const Vec<float> r = (above - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec<float> y = splat(1.0f / 5040);
  y = y * r + 1.0f / 720;
  y = y * r + 1.0f / 120;
  y = y * r + 1.0f / 24;
  y = y * r + 1.0f / 6;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  const Int power = ((Int)shifted - 0x4B400000 + 127) << 23;
  const Vec<float> result = x < lowest ? Vec<float>{} : y * (Vec<float>)power;
  return x == x ? result : x;
}

FC_INLINE Vec<double> exp_of(Vec<double> x) {
  for (int i = 0; i < Simd<double>::kLanes; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

}  // namespace FC_ISA
}  // namespace fastcircuit
