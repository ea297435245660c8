// What the masks and the stream are multiplied as: here in the type that sums are kept in; bf16_products.h in pairs.
#pragma once

#include "panel.h"

namespace fastcircuit {
namespace FC_ISA {

// S: the type of the stream.
template <class S>
struct Products {
  using A = typename Traits<S>::Accumulate;
  using Factor = A;  // of the mask, and of a panel: one step of a product is a factor of each
  using Dot = A;     // of grad_reads, where it is multiplied by the stream
  using Copy = PanelCopy<S>;
  static constexpr int kDotLanes = Simd<A>::kLanes, kDotTile = kTile<A>;  // columns: of a register, and side by side

  // How many factors a step's number of the mask is the sum of.
  struct Parts {
    explicit Parts(int) {}
    constexpr operator int() const { return 1; }
  };

  static int64_t steps(int64_t rows) { return rows; }
  static FC_INLINE void add(Vec<A>& sum, Vec<A> a, Vec<A> b) { sum += a * b; }
  static FC_INLINE Vec<A> load_dot(const A* p) { return Traits<A>::load(p); }
  static FC_INLINE Vec<A> load_row(const S* p) { return Traits<S>::load(p); }

  static void pack_edge(const S* first, int64_t stride, int64_t rows, int64_t width, A* packed) {
    fastcircuit::FC_ISA::pack_edge(first, stride, rows, width, packed);
  }
};

// A row of a tile of sums to memory.
template <bool Around, class S, class V>
FC_INLINE void store_tile_row(S* to, const V (&row)[kVecs]) {
  for (int v = 0; v < kVecs; ++v) {
    S* const at = to + v * Simd<typename Traits<S>::Accumulate>::kLanes;
    if constexpr (Around) {
      Traits<S>::store_around_cache(at, row[v]);
    } else {
      Traits<S>::store(at, row[v]);
    }
  }
}

// grad_reads as both products of the backward want it: here one copy, packed[tile][reader][kTile].
template <class S>
class GradReads {
 public:
  using A = typename Traits<S>::Accumulate;
  static constexpr int64_t kMostBytes = 192 * 1024;  // so many stay near

  static int64_t bytes(int64_t readers, int64_t columns) { return readers * columns * int64_t(sizeof(A)); }

  GradReads(const BackwardParams& p, void* memory, int64_t) : p_(p), packed_(static_cast<A*>(memory)) {}

  const A* factors(int64_t tile) const { return packed_ + tile * p_.readers * kTile<A>; }
  const A* dots() const { return packed_; }

  // Copies columns [begin, begin + width), zero beyond width.
  void pack(int64_t begin, int64_t width) {
    A* to = packed_;
    for (int64_t tile = 0; tile < width; tile += kTile<A>) {
      const S* x = static_cast<const S*>(p_.grad_reads) + begin + tile;
      fastcircuit::FC_ISA::pack_edge(x, p_.grad_reads_stride, p_.readers, width - tile, to);
      to += p_.readers * kTile<A>;
    }
  }

 private:
  const BackwardParams& p_;
  A* const packed_;
};

}  // namespace FC_ISA
}  // namespace fastcircuit
