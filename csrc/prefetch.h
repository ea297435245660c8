// Fetching what is used next while something else is computed.
#pragma once

#include "simd.h"

namespace fastcircuit {
namespace FC_ISA {

// A cache line per step of a multiplication, row by row so that memory is read in long runs. Loops step a copy of
// their own: what a reference points to would be written back at every step.
struct Prefetch {
  // Nothing to fetch is the same line over and over: cheaper than a second branch.
  const char* at = reinterpret_cast<const char*>(this);
  int64_t hop = 0, lines = INT64_MAX;         // from line to line; lines left in this row
  int64_t rows = 0, row_lines = 0, jump = 0;  // rows left, this one included; from row to row

  Prefetch() = default;

  // `rows` rows of `columns` numbers; none if there are no columns.
  template <class T>
  Prefetch(const T* first, int64_t stride, int64_t rows, int64_t columns) {
    if (rows == 0 || columns <= 0) return;
    at = reinterpret_cast<const char*>(first), hop = 64, this->rows = rows;
    lines = row_lines = (columns * int64_t(sizeof(T)) + 63) / 64;
    jump = stride * int64_t(sizeof(T)) - 64 * row_lines;
  }

  bool done() const { return rows == 0; }

  FC_INLINE void step() {
    __builtin_prefetch(at, 0, 2);
    at += hop;
    if (__builtin_expect(--lines == 0, 0)) {
      at += jump, lines = row_lines;
      if (--rows == 0) at -= jump + hop, hop = 0, lines = INT64_MAX;
    }
  }
};

}  // namespace FC_ISA
}  // namespace fastcircuit
