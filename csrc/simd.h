// Vectors of one register for the instruction set this file is compiled for. Compiled once per instruction set
// (see setup.py), so everything lives in a namespace of that name and nothing from the C++ library is used:
// a shared inline function could otherwise reach a machine that cannot run it.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef FC_X86_VARIANTS
#include <immintrin.h>
#endif

#include "masked_read.h"

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
  // Not 0 + value: only subtracting zero is the identity for every float, and so costs nothing.
  return value - Vec<A>{};
}

// Writes past the caches; `p` is aligned to the vector. finish_stores_around_cache() before anybody else reads it.
template <class T, class V>
FC_INLINE void around_cache(T* p, V v) {
#ifdef FC_X86_VARIANTS
  if constexpr (sizeof(V) == 8) {
    long long bits;
    std::memcpy(&bits, &v, sizeof bits);
    _mm_stream_si64(reinterpret_cast<long long*>(p), bits);
  } else if constexpr (sizeof(V) == 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)v);
#if FC_VECTOR_BYTES >= 32
  } else if constexpr (sizeof(V) == 32) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#endif
#if FC_VECTOR_BYTES >= 64
  } else if constexpr (sizeof(V) == 64) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#endif
  }
#else
  std::memcpy(p, &v, sizeof v);
#endif
}

// Whether `rows` rows, `row_bytes` apart, are to be written that way: more than this does not stay in cache anyway.
inline bool goes_around_cache(const void* first, int64_t rows, int64_t row_bytes) {
  constexpr int64_t kLeast = 4 << 20;
  return rows * row_bytes >= kLeast && row_bytes % kBytes == 0 && reinterpret_cast<uintptr_t>(first) % kBytes == 0;
}

FC_INLINE void finish_stores_around_cache() {
#ifdef FC_X86_VARIANTS
  _mm_sfence();
#endif
}

// A tile of sums, kRows rows of kVecs registers: as large as the registers hold beside what is multiplied.
#if FC_VECTOR_BYTES == 64
constexpr int kRows = 6, kVecs = 4;
#elif FC_VECTOR_BYTES == 32
constexpr int kRows = 6, kVecs = 2;
#else
constexpr int kRows = 4, kVecs = 2;
#endif

template <class A>
constexpr int kTile = kVecs * Simd<A>::kLanes;

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
  static FC_INLINE void store_around_cache(S* p, Vec<S> v) { around_cache(p, v); }
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
  static FC_INLINE void store(Bf16* p, Vec<float> v) {
    const Narrow out = narrow(v);
    std::memcpy(p, &out, sizeof out);
  }
  static FC_INLINE void store_around_cache(Bf16* p, Vec<float> v) { around_cache(p, narrow(v)); }

 private:
  // Rounds to nearest even; a NaN stays one, whatever its payload.
  static FC_INLINE Narrow narrow(Vec<float> v) {
    const Wide bits = (Wide)v;
    const Wide rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Wide is_nan = (Wide)(Signed)(v != v);
    return __builtin_convertvector((is_nan & 0x7fc0u) | (~is_nan & rounded), Narrow);
  }
};

// The first `count` numbers (all lanes or fewer), and zeros after them.
template <class S, class V = Vec<typename Traits<S>::Accumulate>>
FC_INLINE V load_some(const S* p, int64_t count) {
  constexpr int kLanes = Simd<typename Traits<S>::Accumulate>::kLanes;
  if (count >= kLanes) return Traits<S>::load(p);
  S lanes[kLanes] = {};
  std::memcpy(lanes, p, sizeof(S) * count);
  return Traits<S>::load(lanes);
}

template <class S, class V>
FC_INLINE void store_some(S* p, V v, int64_t count) {
  constexpr int kLanes = Simd<typename Traits<S>::Accumulate>::kLanes;
  if (count >= kLanes) return Traits<S>::store(p, v);
  S lanes[kLanes];
  Traits<S>::store(lanes, v);
  std::memcpy(p, lanes, sizeof(S) * count);
}

// Adds the upper half to the lower one until one lane is left.
template <class A, int Lanes, class V>
FC_INLINE A sum_lanes(V v) {
  if constexpr (Lanes == 1) {
    return v[0];
  } else {
    typedef A Half __attribute__((vector_size(sizeof(A) * (Lanes / 2))));
    Half low, high;
    std::memcpy(&low, &v, sizeof low);
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
    return sum_lanes<A, Lanes / 2>(low + high);
  }
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define FC_SHUFFLES
#endif
#endif

#ifdef FC_SHUFFLES
// Of the segments of `Size` lanes that a and then b are made of, those with an even number, or an odd one.
template <class A, int Size, int Odd, class Lanes>
struct Segments;

template <int... I>
struct Numbers {};
template <int N, int... I>
struct Count : Count<N - 1, N - 1, I...> {};
template <int... I>
struct Count<0, I...> {
  using Type = Numbers<I...>;
};

template <class A, int Size, int Odd, int... I>
struct Segments<A, Size, Odd, Numbers<I...>> {
  static FC_INLINE Vec<A> take(Vec<A> a, Vec<A> b) {
    return __builtin_shufflevector(a, b, (2 * (I / Size) + Odd) * Size + I % Size...);
  }
};

// Puts the sums of the lanes of v[0], ..., v[N - 1] into v[0], v[1], ... without gaps: halves are added, then quarters.
template <class A, int N, int Size = Simd<A>::kLanes / 2>
FC_INLINE void sum_lanes_of_all(Vec<A>* v) {
  using Lanes = typename Count<Simd<A>::kLanes>::Type;
  for (int i = 0; i < N; i += 2) {
    const Vec<A> a = v[i], b = i + 1 < N ? v[i + 1] : Vec<A>{};
    v[i / 2] = Segments<A, Size, 0, Lanes>::take(a, b) + Segments<A, Size, 1, Lanes>::take(a, b);
  }
  if constexpr (Size > 1) sum_lanes_of_all<A, (N + 1) / 2, Size / 2>(v);
}
#endif

}  // namespace FC_ISA
}  // namespace fastcircuit
