// Fetching what is used next while something else is computed.
#pragma once

#include "simd.h"

namespace fastcircuit {
namespace FC_ISA {

// A cache line per step of a multiplication, kTogether rows side by side: as many runs at a time keep more of the memory
// busy than one after the other. Loops step a copy of their own: what a reference points to would be written back at
// every step.
struct Prefetch {
  static constexpr int64_t kTogether = 8;

  // Nothing to fetch is the same line over and over: cheaper than a second branch.
  const char* at = reinterpret_cast<const char*>(this);
  int64_t stride = 0, left = INT64_MAX;  // from row to row; rows left before the group's next line
  int64_t together = 0, rows = 0;        // rows of the group; rows left, the group's included
  int64_t lines = 0, row_lines = 0;      // lines left in the group; of a row

  Prefetch() = default;

  // `rows` rows of `columns` numbers; none if there are no columns.
  template <class T>
  Prefetch(const T* first, int64_t stride, int64_t rows, int64_t columns) {
    if (rows == 0 || columns <= 0) return;
    at = reinterpret_cast<const char*>(first), this->stride = stride * int64_t(sizeof(T)), this->rows = rows;
    row_lines = (columns * int64_t(sizeof(T)) + 63) / 64;
    begin_group();
  }

  bool done() const { return rows == 0; }

  FC_INLINE void step() {
    __builtin_prefetch(at, 0, 2);
    at += stride;
    if (__builtin_expect(--left == 0, 0)) next_line();
  }

 private:
  FC_INLINE void begin_group() {
    left = together = rows < kTogether ? rows : kTogether;
    lines = row_lines;
  }

  FC_INLINE void next_line() {
    at += 64 - together * stride, left = together;
    if (__builtin_expect(--lines != 0, 1)) return;
    at += together * stride - 64 * row_lines;
    rows -= together;
    if (rows > 0) return begin_group();
    stride = 0, left = INT64_MAX;
  }
};

FC_INLINE void fetch(Prefetch& prefetch, int64_t lines) {
  Prefetch ahead = prefetch;
  for (int64_t i = 0; i < lines; ++i) ahead.step();
  prefetch = ahead;
}

}  // namespace FC_ISA
}  // namespace fastcircuit
