// Chains of multiply-adds in registers.
#pragma once

#include "peak.h"
#include "simd.h"

namespace fastcircuit {
namespace FC_ISA {

// As many sums as a tile of masked_read has: they fill the registers and hide how long one step takes. `step` adds to a
// sum; the result is used, or nothing would be computed.
template <class A, class Step>
FC_INLINE int64_t run_chains(int64_t rounds, const Step& step) {
  constexpr int kChains = kRows * kVecs;
  Vec<A> sums[kChains];
#pragma GCC unroll 64
  for (int i = 0; i < kChains; ++i) sums[i] = splat(A(i));
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 64
    for (int i = 0; i < kChains; ++i) step(sums[i]);
  }
  Vec<A> total{};
#pragma GCC unroll 64
  for (int i = 0; i < kChains; ++i) total += sums[i];
  volatile A used = sum_lanes<A, Simd<A>::kLanes>(total);
  (void)used;
  return rounds * kChains * Simd<A>::kLanes;
}

}  // namespace FC_ISA
}  // namespace fastcircuit
