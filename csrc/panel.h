// Rows of the stream copied tile by tile, ahead of the products that use them.
#pragma once

#include "prefetch.h"

namespace fastcircuit {
namespace FC_ISA {

// The tiles of a panel in an order that memory likes: kTogether rows side by side, then the rows below them, then the
// panel to the right. Going down all rows for every tile instead would look up a page for each, and rows that lie a
// large power of two apart share one set of the processor's tables, and of its caches, where they drive each other out.
template <class S, int64_t kColumns = kTile<typename Traits<S>::Accumulate>>
struct PanelWalk {
  static constexpr int64_t kTogether = Prefetch::kTogether;

  const S* at;
  int64_t stride, rows, tiles;
  int64_t pitch = rows;  // from a tile's copy to that of the next one, in rows
  int64_t group = rows < kTogether ? rows : kTogether, in_group = group, tiles_left = tiles, rows_left = rows;

  // Goes to the next tile; returns how far from this one's place among the copies its own is.
  FC_INLINE int64_t advance() {
    at += stride;
    if (__builtin_expect(--in_group != 0, 1)) return kColumns;
    at += kColumns - group * stride, in_group = group;
    if (__builtin_expect(--tiles_left != 0, 1)) return (pitch - group + 1) * kColumns;
    const int64_t next = (1 - (tiles - 1) * pitch) * kColumns;
    at += group * stride - tiles * kColumns, tiles_left = tiles, rows_left -= group;
    if (__builtin_expect(rows_left == 0, 0)) at += tiles * kColumns - rows * stride, rows_left = rows;
    in_group = group = rows_left < kTogether ? rows_left : kTogether;
    return next;
  }
};

// Copies a panel, a tile of one row per step, to packed[tile][row][kTile].
template <class S, class A = typename Traits<S>::Accumulate>
class PanelCopy {
 public:
  PanelCopy() = default;

  PanelCopy(const S* first, int64_t stride, int64_t rows, int64_t tiles, A* packed)
      : from_{first, stride, rows, tiles}, fetched_(from_), to_(packed), left_(rows * tiles) {
    for (int64_t i = 0; i < kAhead && left_ > 0; ++i) fetched_.advance();
  }

  FC_INLINE void step() {
    if (left_ == 0) return;
    for (int64_t byte = 0; byte < kStepBytes; byte += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(fetched_.at) + byte, 0, 2);
    fetched_.advance();
    for (int v = 0; v < kVecs; ++v)
      Traits<A>::store(to_ + v * Simd<A>::kLanes, Traits<S>::load(from_.at + v * Simd<A>::kLanes));
    to_ += from_.advance();
    --left_;
  }

  void finish() {
    while (left_ > 0) step();
  }

 private:
  static constexpr int64_t kStepBytes = kTile<A> * sizeof(S);
  static constexpr int64_t kAhead = (4096 + kStepBytes - 1) / kStepBytes;  // steps from fetching a tile to copying it

  PanelWalk<S> from_{}, fetched_{};
  A* to_ = nullptr;
  int64_t left_ = 0;
};

// The last columns of all rows, fewer than a tile, and zeros beyond them.
template <class S, class A = typename Traits<S>::Accumulate>
void pack_edge(const S* first, int64_t stride, int64_t rows, int64_t width, A* packed) {
  constexpr int kLanes = Simd<A>::kLanes;
  for (int64_t w = 0; w < rows; ++w, first += stride)
    for (int v = 0; v < kVecs; ++v, packed += kLanes)
      Traits<A>::store(packed, v * kLanes < width ? load_some(first + v * kLanes, width - v * kLanes) : Vec<A>{});
}

}  // namespace FC_ISA
}  // namespace fastcircuit
