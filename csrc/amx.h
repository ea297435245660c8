// Matrix tiles (Intel AMX): a tile is at most 16 rows of 64 bytes; one instruction multiplies a left factor, rows of 32
// bfloat16, with a right one, 16 rows of 16 pairs, and adds to rows of 16 float32. Products are exact, sums float32.
#pragma once

#include <immintrin.h>

#include "bf16.h"
#include "mask_parts.h"

namespace fastcircuit {
namespace FC_ISA {

constexpr int64_t kTileRows = 16, kTileBytes = 16 * 64;

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

}  // namespace FC_ISA
}  // namespace fastcircuit
