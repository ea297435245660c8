// Copies and transposes of small matrices, between the type in memory and the one that sums are kept in.
#pragma once

#include "simd.h"

namespace fastcircuit {
namespace FC_ISA {

template <class S, class A = typename Traits<S>::Accumulate>
FC_INLINE A number(const S& s) {
  if constexpr (sizeof(S) == sizeof(A)) {
    return s;
  } else {
    const uint32_t bits = uint32_t(s.bits) << 16;
    A value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
}

template <class S, class A>
FC_INLINE void store_number(S* s, A value) {
  if constexpr (sizeof(S) == sizeof(A)) {
    *s = value;
  } else {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    s->bits = uint16_t(value == value ? (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16 : 0x7fc0u);  // to nearest even
  }
}

template <class A>
struct Four {
  typedef A Vec __attribute__((vector_size(4 * sizeof(A))));
};
typedef uint32_t FourWide __attribute__((vector_size(16)));
typedef uint16_t FourNarrow __attribute__((vector_size(8)));

template <class S, class V>
FC_INLINE void load_four(const S* from, V& to) {
  if constexpr (sizeof(V) == 4 * sizeof(S)) {
    std::memcpy(&to, from, sizeof to);
  } else {
    FourNarrow bits;
    std::memcpy(&bits, from, sizeof bits);
    to = (V)(__builtin_convertvector(bits, FourWide) << 16);
  }
}

template <class S, class V>
FC_INLINE void store_four(S* to, const V& from) {
  if constexpr (sizeof(V) == 4 * sizeof(S)) {
    std::memcpy(to, &from, sizeof from);
  } else {
    const FourWide bits = (FourWide)from, is_nan = (FourWide)(from != from);
    const FourWide rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const FourNarrow narrow = __builtin_convertvector((is_nan & 0x7fc0u) | (~is_nan & rounded), FourNarrow);
    std::memcpy(to, &narrow, sizeof narrow);
  }
}

// to[r, c] = from[r, c]; rows of both are so far apart.
template <class From, class To, class A = typename Traits<From>::Accumulate>
FC_INLINE void copy(const From* from, int64_t from_row, int64_t rows, int64_t columns, To* to, int64_t to_row) {
  for (int64_t r = 0; r < rows; ++r, from += from_row, to += to_row) {
    int64_t c = 0;
    for (typename Four<A>::Vec x; c + 4 <= columns; c += 4) {
      load_four(from + c, x);
      store_four(to + c, x);
    }
    for (; c < columns; ++c) store_number(to + c, number(from[c]));
  }
}

// to[c, r] = from[r, c]; rows of both are so far apart. Four by four in registers where that is possible.
template <class From, class To, class A = typename Traits<From>::Accumulate>
FC_INLINE void transpose(const From* from, int64_t from_row, int64_t rows, int64_t columns, To* to, int64_t to_row) {
  int64_t whole_rows = 0, whole_columns = 0;
#ifdef FC_SHUFFLES
  using Vec = typename Four<A>::Vec;
  whole_rows = rows / 4 * 4;
  whole_columns = columns / 4 * 4;
  for (int64_t r = 0; r < whole_rows; r += 4) {
    for (int64_t c = 0; c < whole_columns; c += 4) {
      Vec x[4];
      for (int i = 0; i < 4; ++i) load_four(from + (r + i) * from_row + c, x[i]);
      const Vec low01 = __builtin_shufflevector(x[0], x[1], 0, 4, 1, 5);
      const Vec low23 = __builtin_shufflevector(x[2], x[3], 0, 4, 1, 5);
      const Vec high01 = __builtin_shufflevector(x[0], x[1], 2, 6, 3, 7);
      const Vec high23 = __builtin_shufflevector(x[2], x[3], 2, 6, 3, 7);
      store_four(to + c * to_row + r, __builtin_shufflevector(low01, low23, 0, 1, 4, 5));
      store_four(to + (c + 1) * to_row + r, __builtin_shufflevector(low01, low23, 2, 3, 6, 7));
      store_four(to + (c + 2) * to_row + r, __builtin_shufflevector(high01, high23, 0, 1, 4, 5));
      store_four(to + (c + 3) * to_row + r, __builtin_shufflevector(high01, high23, 2, 3, 6, 7));
    }
  }
#endif
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c)
      store_number(to + c * to_row + r, number(from[r * from_row + c]));
}

}  // namespace FC_ISA
}  // namespace fastcircuit
