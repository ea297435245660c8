// Registers of 32 bfloat16, for instruction sets that multiply them in pairs: products are exact, sums float32.
#pragma once

#include <immintrin.h>

#include "panel.h"

namespace fastcircuit {
namespace FC_ISA {

constexpr int64_t kSums = 16;   // float32 in a register
constexpr int64_t kInner = 32;  // bfloat16 in a register

// 32 numbers, or the first `count` and zeros.
FC_INLINE __m512i load_32(const Bf16* p, int64_t count = kInner) {
  if (count >= kInner) return _mm512_loadu_si512(p);
  return count <= 0 ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi16((1u << count) - 1, p);
}

FC_INLINE void store_32(Bf16* p, __m512i v, int64_t count) {
  if (count >= kInner) return _mm512_storeu_si512(p, v);
  _mm512_mask_storeu_epi16(p, (1u << count) - 1, v);
}

// The same as float32: the first 16, and the others.
FC_INLINE void load_wide(const Bf16* p, int64_t count, __m512& low, __m512& high) {
  Bf16 some[kInner];
  if (count < kInner) {
    _mm512_storeu_si512(some, load_32(p, count));
    p = some;
  }
  low = (__m512)Traits<Bf16>::load(p), high = (__m512)Traits<Bf16>::load(p + kSums);
}

FC_INLINE __m512i narrow(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

// Two rows of the index summed over as a row of two right factors: 16 pairs each.
struct Pairs {
  __m512i half[2];
};

FC_INLINE Pairs pair_up(__m512i first, __m512i second) {
  alignas(64) static constexpr uint16_t kOrder[] = {
      0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
      11, 43, 12, 44, 13, 45, 14, 46, 15, 47, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53,
      22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
  return {{_mm512_permutex2var_epi16(first, _mm512_load_si512(kOrder), second),
           _mm512_permutex2var_epi16(first, _mm512_load_si512(kOrder + 32), second)}};
}

// Copies a panel of pairs of rows, kColumns of a pair per step, to[columns / kColumns][pitch] places of kPlace bytes:
// registers of 16 pairs, `apart` bytes from each other.
template <int64_t kColumns, int64_t kPlace>
class PairCopy {
 public:
  PairCopy() = default;

  PairCopy(const Bf16* first, int64_t stride, int64_t pairs, int64_t steps, char* to, int64_t pitch, int64_t apart)
      : from_{first, 2 * stride, pairs, steps, pitch}, fetched_(from_), stride_(stride), apart_(apart), to_(to),
        left_(pairs * steps) {
    for (int64_t i = 0; i < kAhead && i < left_; ++i) fetched_.advance();
  }

  FC_INLINE void step() {
    if (left_ == 0) return;
    for (int64_t c = 0; c < kColumns; c += kInner) {
      __builtin_prefetch(fetched_.at + c, 0, 2);
      __builtin_prefetch(fetched_.at + stride_ + c, 0, 2);
    }
    fetched_.advance();
    for (int64_t c = 0; c < kColumns; c += kInner) {
      const Pairs pairs = pair_up(load_32(from_.at + c), load_32(from_.at + stride_ + c));
      _mm512_store_si512(to_ + c / kSums * apart_, pairs.half[0]);
      _mm512_store_si512(to_ + (c / kSums + 1) * apart_, pairs.half[1]);
    }
    to_ += from_.advance() * (kPlace / kColumns);
    --left_;
  }

  void finish() {
    while (left_ > 0) step();
  }

 private:
  static constexpr int64_t kAhead = 1024 / kColumns;  // steps from fetching a pair to copying it

  PanelWalk<Bf16, kColumns> from_{}, fetched_{};
  int64_t stride_ = 0, apart_ = 0;
  char* to_ = nullptr;
  int64_t left_ = 0;
};

}  // namespace FC_ISA
}  // namespace fastcircuit
