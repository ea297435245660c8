// Vectors of one register for the instruction set this file is compiled for. Compiled once per instruction set
// (see setup.py), so everything lives in a namespace of that name and nothing from the C++ library is used:
// a shared inline function could otherwise reach a machine that cannot run it.
#pragma once

#include <cstdint>
#include <cstring>

#include "masked_read.h"

#define FC_INLINE inline __attribute__((always_inline))

namespace fastcircuit {
namespace FC_ISA {

constexpr int kBytes = FC_VECTOR_BYTES;

// A: the type sums are kept in (float or double).
template <class A>
struct Simd {
  static constexpr int kLanes = kBytes / sizeof(A);
  typedef A Vec __attribute__((vector_size(kBytes)));
};

template <class A>
using Vec = typename Simd<A>::Vec;

template <class A>
FC_INLINE Vec<A> splat(A value) {
  return Vec<A>{} + value;
}

// S: the type in memory. Accumulate<S>: the type its sums are kept in.
template <class S>
struct Traits {
  using Accumulate = S;
  static FC_INLINE Vec<S> load(const S* p) {
    Vec<S> v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static FC_INLINE void store(S* p, Vec<S> v) { std::memcpy(p, &v, sizeof v); }
};

template <>
struct Traits<Bf16> {
  using Accumulate = float;
  typedef uint32_t Wide __attribute__((vector_size(kBytes)));
  typedef int32_t Signed __attribute__((vector_size(kBytes)));
  typedef uint16_t Narrow __attribute__((vector_size(kBytes / 2)));

  static FC_INLINE Vec<float> load(const Bf16* p) {
    Narrow bits;
    std::memcpy(&bits, p, sizeof bits);
    return (Vec<float>)(__builtin_convertvector(bits, Wide) << 16);
  }
  // Round to nearest even; a NaN stays one, whatever its payload.
  static FC_INLINE void store(Bf16* p, Vec<float> v) {
    const Wide bits = (Wide)v;
    const Wide rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Wide is_nan = (Wide)(Signed)(v != v);
    const Narrow out = __builtin_convertvector((is_nan & 0x7fc0u) | (~is_nan & rounded), Narrow);
    std::memcpy(p, &out, sizeof out);
  }
};

template <class A>
FC_INLINE A sum_lanes(Vec<A> v) {
  A lanes[Simd<A>::kLanes];
  std::memcpy(lanes, &v, sizeof v);
  for (int width = Simd<A>::kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

}  // namespace FC_ISA
}  // namespace fastcircuit
