// Products of bfloat16 in pairs, two rows of the stream (or two columns) at a time: twice as many per instruction.
#pragma once

#include "bf16.h"
#include "products.h"

namespace fastcircuit {
namespace FC_ISA {

using Pair = int32_t;  // two bfloat16

// Registers of 16 pairs from two rows, for a tile: zeros after `count` columns.
FC_INLINE void pair_tile(const Bf16* first, const Bf16* second, int64_t count, Pair* to) {
  for (int64_t c = 0; c < kTile<float>; c += kInner) {
    const Pairs pairs = pair_up(load_32(first + c, count - c),
                                second ? load_32(second + c, count - c) : _mm512_setzero_si512());
    _mm512_store_si512(to + c, pairs.half[0]);
    _mm512_store_si512(to + c + kSums, pairs.half[1]);
  }
}

// A panel of the stream as pairs of rows, packed[tile][pair][kTile]; a last row without another one is paired with zeros.
class PairedPanelCopy {
 public:
  PairedPanelCopy() = default;

  PairedPanelCopy(const Bf16* first, int64_t stride, int64_t rows, int64_t tiles, Pair* packed)
      : copy_(first, stride, rows / 2, tiles, reinterpret_cast<char*>(packed), (rows + 1) / 2, kBytes),
        last_(rows % 2 ? first + (rows - 1) * stride : nullptr), tiles_(tiles), pairs_((rows + 1) / 2),
        packed_(packed) {}

  FC_INLINE void step() { copy_.step(); }

  void finish() {
    copy_.finish();
    for (int64_t tile = 0; last_ && tile < tiles_; ++tile)
      pair_tile(last_ + tile * kTile<float>, nullptr, kTile<float>,
                packed_ + (tile * pairs_ + pairs_ - 1) * kTile<float>);
  }

 private:
  PairCopy<kTile<float>, kTile<float> * sizeof(Pair)> copy_;
  const Bf16* last_ = nullptr;
  int64_t tiles_ = 0, pairs_ = 0;
  Pair* packed_ = nullptr;
};

template <>
struct Products<Bf16> {
  using A = float;
  using Factor = Pair;
  using Dot = Bf16;
  using Copy = PairedPanelCopy;
  using Parts = int;
  static constexpr int kDotLanes = kInner, kDotTile = kInner;  // one register: GCC would unroll two, and spill

  static int64_t steps(int64_t rows) { return (rows + 1) / 2; }

  template <class V>
  static FC_INLINE void add(Vec<float>& sum, V a, V b) {
    sum = (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }

  static FC_INLINE Vec<Pair> load_dot(const Bf16* p) { return load_row(p); }
  static FC_INLINE Vec<Pair> load_row(const Bf16* p) { return Traits<Pair>::load(reinterpret_cast<const Pair*>(p)); }

  static void pack_edge(const Bf16* first, int64_t stride, int64_t rows, int64_t width, Pair* packed) {
    for (int64_t r = 0; r < rows; r += 2, first += 2 * stride, packed += kTile<float>)
      pair_tile(first, r + 1 < rows ? first + stride : nullptr, width, packed);
  }
};

template <bool Around>
FC_INLINE void store_tile_row(Bf16* to, const Vec<float> (&row)[kVecs]) {
  for (int v = 0; v < kVecs; v += 2, to += kInner) {
    const __m512i both = narrow((__m512)row[v], (__m512)row[v + 1]);
    if constexpr (Around) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to), both);
    } else {
      store_32(to, both, kInner);
    }
  }
}

// Two copies: pairs of readers [tile][pair][kTile] for the stream's gradient, [step][reader][kInner] for the mask's.
template <>
class GradReads<Bf16> {
 public:
  static constexpr int64_t kMostBytes = 384 * 1024;  // the columns take half the time, and summing lanes after them as long

  static int64_t bytes(int64_t readers, int64_t columns) {
    return columns * (Products<Bf16>::steps(readers) * int64_t(sizeof(Pair)) + readers * int64_t(sizeof(Bf16)));
  }

  GradReads(const BackwardParams& p, void* memory, int64_t columns)
      : p_(p), pairs_(static_cast<Pair*>(memory)),
        rows_(reinterpret_cast<Bf16*>(pairs_ + columns * Products<Bf16>::steps(p.readers))) {}

  const Pair* factors(int64_t tile) const { return pairs_ + tile * Products<Bf16>::steps(p_.readers) * kTile<float>; }
  const Bf16* dots() const { return rows_; }

  void pack(int64_t begin, int64_t width) {
    Pair* pairs = pairs_;
    Bf16* rows = rows_;
    for (int64_t c = 0; c < width; c += kTile<float>) {
      const Bf16* x = static_cast<const Bf16*>(p_.grad_reads) + begin + c;
      if (p_.grad_stream) Products<Bf16>::pack_edge(x, p_.grad_reads_stride, p_.readers, width - c, pairs);
      pairs += Products<Bf16>::steps(p_.readers) * kTile<float>;
      for (int64_t i = 0; p_.grad_mask && i < kTile<float>; i += kInner)
        for (int64_t r = 0; r < p_.readers; ++r, rows += kInner)
          _mm512_store_si512(rows, load_32(x + r * p_.grad_reads_stride + i, width - c - i));
    }
  }

 private:
  const BackwardParams& p_;
  Pair* const pairs_;
  Bf16* const rows_;
};

}  // namespace FC_ISA
}  // namespace fastcircuit
