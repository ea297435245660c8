// Matrix tiles (Intel AMX): a tile is at most 16 rows of 64 bytes; one instruction multiplies a left factor, rows of 32
// bfloat16, with a right one, 16 rows of 16 pairs, and adds to rows of 16 float32. Products are exact, sums float32.
#pragma once

#include <immintrin.h>

#include "simd.h"

namespace fastcircuit {
namespace FC_ISA {

constexpr int64_t kTileRows = 16, kTileBytes = 16 * 64;
constexpr int64_t kSums = 16;   // float32 in a tile's row
constexpr int64_t kInner = 32;  // numbers summed over by one product, and bfloat16 in a row

// The compiler does not know that a tile load reads memory: what was stored for it must be stored before this.
FC_INLINE void before_tile_loads() { asm volatile("" ::: "memory"); }

// Where this lives the tiles are configured: the last `rights` of the eight are right factors, the others sums or left
// factors of `rows` rows.
class Tiles {
 public:
  explicit Tiles(int64_t rows, int rights = 1) {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = uint8_t(i >= 8 - rights ? kTileRows : rows);
    before_tile_loads();
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// `total` rows as `count` blocks of equally many, since a tile cannot change its height on the way: where that is more
// rows than there are, the last blocks begin early and repeat some of the rows before them.
struct EqualBlocks {
  int64_t total, count, rows;

  EqualBlocks(int64_t total, int64_t count) : total(total), count(count), rows((total + count - 1) / count) {}
  int64_t begin(int64_t block) const { return block * rows + rows <= total ? block * rows : total - rows; }
  int64_t repeated(int64_t block) const {
    const int64_t early = block * rows - begin(block);
    return early < rows ? early : rows;
  }
};

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

// to[row][lane] = from[lane][row], 16 x 16 lanes of 32 bits.
inline void transpose(const __m512i (&from)[16], __m512i* to) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(from[i], from[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(from[i], from[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int half = 0; half < 2; ++half) {
      b[i + 2 * half] = _mm512_unpacklo_epi64(a[i + half], a[i + 2 + half]);
      b[i + 2 * half + 1] = _mm512_unpackhi_epi64(a[i + half], a[i + 2 + half]);
    }
  for (int i = 0; i < 4; ++i) {  // b[4 g + i] holds lanes i, 4 + i, 8 + i, 12 + i of rows 4 g .. 4 g + 3
    const __m512i low = _mm512_shuffle_i32x4(b[i], b[4 + i], 0x88), high = _mm512_shuffle_i32x4(b[i], b[4 + i], 0xdd);
    const __m512i low2 = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0x88);
    const __m512i high2 = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0xdd);
    _mm512_store_si512(to + i, _mm512_shuffle_i32x4(low, low2, 0x88));
    _mm512_store_si512(to + 4 + i, _mm512_shuffle_i32x4(high, high2, 0x88));
    _mm512_store_si512(to + 8 + i, _mm512_shuffle_i32x4(low, low2, 0xdd));
    _mm512_store_si512(to + 12 + i, _mm512_shuffle_i32x4(high, high2, 0xdd));
  }
}

// A float32 as the sum of bfloat16 parts: one is enough for a bfloat16, two are closer than a bfloat16 result can
// tell, three are all of it (below 2^-110 the last ones are lost).
constexpr int kMaxParts = 3;

inline int mask_parts(Dtype mask, Dtype result) { return mask == Dtype::bf16 ? 1 : result == Dtype::bf16 ? 2 : 3; }

inline void split(float value, Bf16 (&parts)[kMaxParts]) {
  for (Bf16& part : parts) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits = (bits + 0x8000) & 0xffff0000;
    part.bits = uint16_t(bits >> 16);
    float rounded;
    std::memcpy(&rounded, &bits, sizeof rounded);
    value -= rounded;
  }
}

}  // namespace FC_ISA
}  // namespace fastcircuit
