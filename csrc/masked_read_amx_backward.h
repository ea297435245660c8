// The backward kernel on matrix tiles. For each panel of columns grad_reads becomes two sets of right factors; then two
// blocks of writers at a time take both products while their rows are in cache.
#pragma once

#include "amx.h"
#include "prefetch.h"

namespace fastcircuit {
namespace FC_ISA {

constexpr int64_t kPanelColumns = 512, kPanelSteps = kPanelColumns / kInner;
constexpr int64_t kPanelsPerSum = 16;  // what is summed in float32 before it is added in float64

// sums[n] and [3 + n] += left[0] and left[1] right[n]: two blocks of writers, N <= 3 blocks of readers.
template <int N>
FC_INLINE void add_mask_products(const void* left0, const void* left1, int64_t row_bytes, const char* right) {
  _tile_loadd(7, right, 64);
  _tile_loadd(6, left0, row_bytes);
  _tile_dpbf16ps(0, 6, 7);
  _tile_loadd(6, left1, row_bytes);
  _tile_dpbf16ps(3, 6, 7);
  if constexpr (N > 1) {
    _tile_loadd(7, right + kTileBytes, 64);
    _tile_dpbf16ps(4, 6, 7);
    _tile_loadd(6, left0, row_bytes);
    _tile_dpbf16ps(1, 6, 7);
  }
  if constexpr (N > 2) {
    _tile_loadd(7, right + 2 * kTileBytes, 64);
    _tile_dpbf16ps(2, 6, 7);
    _tile_loadd(6, left1, row_bytes);
    _tile_dpbf16ps(5, 6, 7);
  }
}

template <int N>
FC_INLINE void load_totals(const char* totals) {
  before_tile_loads();
  _tile_loadd(0, totals, 64);
  _tile_loadd(3, totals + 3 * kTileBytes, 64);
  if constexpr (N > 1) {
    _tile_loadd(1, totals + kTileBytes, 64);
    _tile_loadd(4, totals + 4 * kTileBytes, 64);
  }
  if constexpr (N > 2) {
    _tile_loadd(2, totals + 2 * kTileBytes, 64);
    _tile_loadd(5, totals + 5 * kTileBytes, 64);
  }
}

template <int N>
FC_INLINE void store_totals(char* totals) {
  _tile_stored(0, totals, 64);
  _tile_stored(3, totals + 3 * kTileBytes, 64);
  if constexpr (N > 1) {
    _tile_stored(1, totals + kTileBytes, 64);
    _tile_stored(4, totals + 4 * kTileBytes, 64);
  }
  if constexpr (N > 2) {
    _tile_stored(2, totals + 2 * kTileBytes, 64);
    _tile_stored(5, totals + 5 * kTileBytes, 64);
  }
}

// G: the type of grad_stream, bfloat16 or float.
template <class G>
class Backward {
 public:
  static int64_t scratch(const BackwardParams& p) { return Backward(p, nullptr).layout(nullptr); }

  static void range(const BackwardParams& p, const void* mask, void* scratch, double* grad_mask, int64_t begin,
                    int64_t end) {
    Backward backward(p, grad_mask);
    std::memset(scratch, 0, backward.layout(static_cast<char*>(scratch)));
    backward.put_mask(static_cast<const float*>(mask));
    const Tiles tiles(backward.blocks_.rows);
    for (int64_t panel = 1; begin < end; begin += kPanelColumns, ++panel) {
      backward.panel(begin, end);
      if (grad_mask && (panel % kPanelsPerSum == 0 || begin + kPanelColumns >= end)) backward.add_totals();
    }
  }

 private:
  static constexpr int64_t kGroup = 3;  // blocks of readers whose sums are kept at the same time

  Backward(const BackwardParams& p, double* grad_mask)
      : p_(p), grad_mask_(grad_mask), blocks_(p.writers, (p.writers + 2 * kTileRows - 1) / (2 * kTileRows) * 2),
        reader_pairs_((p.readers + 1) / 2), groups_((p.readers + kGroup * kTileRows - 1) / (kGroup * kTileRows)),
        parts_(mask_parts(p.mask_dtype, p.grad_stream_dtype)),
        inner_((parts_ * reader_pairs_ + kTileRows - 1) / kTileRows) {}

  // Points into the scratch memory; returns its size.
  int64_t layout(char* scratch) {
    int64_t used = 0;
    const auto take = [&](int64_t bytes) { return used += bytes, scratch + used - bytes; };
    mask_ = take(blocks_.count * inner_ * kTileBytes);
    pairs_ = take(kPanelSteps * 2 * inner_ * kTileBytes);
    columns_ = take(kPanelSteps * groups_ * kGroup * kTileBytes);
    totals_ = take(blocks_.count * groups_ * kGroup * kTileBytes);
    edge_ = take(2 * kTileBytes);
    sums_ = take(4 * kTileBytes);
    return used;
  }

  // The mask, [writers, readers], as left factors [block][inner]; its parts follow each other along the readers.
  void put_mask(const float* mask) {
    for (int64_t block = 0; block < blocks_.count; ++block)
      for (int64_t row = 0; row < blocks_.rows; ++row)
        for (int64_t r = 0; r < p_.readers; ++r) {
          Bf16 parts[kMaxParts];
          split(mask[(blocks_.begin(block) + row) * p_.readers + r], parts);
          for (int64_t i = 0; i < parts_; ++i) {
            const int64_t at = 2 * i * reader_pairs_ + r;
            char* to = mask_ + (block * inner_ + at / kInner) * kTileBytes + row * 64;
            std::memcpy(to + at % kInner * 2, &parts[i], sizeof(Bf16));
          }
        }
  }

  void panel(int64_t begin, int64_t end) {
    const int64_t next = begin + kPanelColumns, width = (next < end ? next : end) - begin;
    const int64_t next_width = end - next < kPanelColumns ? end - next : kPanelColumns;
    put_grad_reads(begin, width);
    Prefetch next_x(grad_reads() + next, p_.grad_reads_stride, p_.readers, next_width);
    for (int64_t block = 0; block < blocks_.count; block += 2) {
      // Next are the two blocks below, or after the last ones the first of the next panel.
      const bool below = block + 2 < blocks_.count;
      const int64_t first = below ? blocks_.begin(block + 2) : 0, column = below ? begin : next;
      const int64_t rows = p_.writers - first < 2 * blocks_.rows ? p_.writers - first : 2 * blocks_.rows;
      Prefetch next_d(stream(first) + column, p_.stream_stride, rows, below ? width : next_width);
      Prefetch next_g;
      if (p_.grad_stream)
        next_g = {grad_stream(first) + column, p_.grad_stream_stride, rows, below ? width : next_width};
      if (grad_mask_)
        for (int64_t group = 0; group < groups_; ++group) add_mask(block, group, begin, width, next_d, next_x);
      if (p_.grad_stream)
        for (int64_t c = 0; c < width; c += kInner)
          add_stream(block, begin + c, width - c < kInner ? width - c : kInner, pairs(c / kInner), next_g);
    }
  }

  const Bf16* grad_reads() const { return static_cast<const Bf16*>(p_.grad_reads); }
  const Bf16* stream(int64_t w) const { return static_cast<const Bf16*>(p_.stream) + w * p_.stream_stride; }
  G* grad_stream(int64_t w) const { return static_cast<G*>(p_.grad_stream) + w * p_.grad_stream_stride; }

  // grad_reads as right factors: for the stream's gradient [step][inner][half], a row holding two readers, once for
  // each part of the mask; for the mask's [step][block of readers], a row holding two columns of 16 readers.
  char* pairs(int64_t step) const { return pairs_ + step * inner_ * 2 * kTileBytes; }
  char* columns(int64_t step, int64_t block) const {
    return columns_ + (step * groups_ * kGroup + block) * kTileBytes;
  }

  void put_grad_reads(int64_t begin, int64_t width) {
    for (int64_t step = 0; step * kInner < width; ++step) {
      const Bf16* x = grad_reads() + begin + step * kInner;
      const int64_t count = width - step * kInner;
      for (int64_t block = 0; block * kTileRows < p_.readers; ++block) {
        __m512i rows[kTileRows];
        for (int64_t i = 0; i < kTileRows; ++i) {
          const int64_t r = block * kTileRows + i;
          rows[i] = r < p_.readers ? load_32(x + r * p_.grad_reads_stride, count) : _mm512_setzero_si512();
        }
        if (grad_mask_) transpose(rows, reinterpret_cast<__m512i*>(columns(step, block)));
        for (int64_t i = 0; p_.grad_stream && i < kTileRows && block * kTileRows + i < p_.readers; i += 2)
          put_pairs(pairs(step), block * kTileRows / 2 + i / 2, pair_up(rows[i], rows[i + 1]));
      }
    }
  }

  void put_pairs(char* to, int64_t pair, const Pairs& values) const {
    for (int64_t i = 0; i < parts_; ++i, pair += reader_pairs_) {
      char* row = to + pair / kTileRows * 2 * kTileBytes + pair % kTileRows * 64;
      _mm512_store_si512(row, values.half[0]);
      _mm512_store_si512(row + kTileBytes, values.half[1]);
    }
  }

  void add_mask(int64_t block, int64_t group, int64_t begin, int64_t width, Prefetch& next_d, Prefetch& next_x) {
    const int64_t left = (p_.readers + kTileRows - 1) / kTileRows - group * kGroup;
    if (left >= 3) {
      add_mask<3>(block, group, begin, width, next_d, next_x);
    } else if (left == 2) {
      add_mask<2>(block, group, begin, width, next_d, next_x);
    } else {
      add_mask<1>(block, group, begin, width, next_d, next_x);
    }
  }

  // totals[two blocks of writers][N blocks of readers] += stream grad_reads^T
  template <int N>
  void add_mask(int64_t block, int64_t group, int64_t begin, int64_t width, Prefetch& next_d, Prefetch& next_x) {
    char* const totals = totals_ + (block * groups_ + 2 * group) * kGroup * kTileBytes;
    const int64_t row_bytes = p_.stream_stride * int64_t(sizeof(Bf16)), whole = width / kInner;
    const Bf16 *d0 = stream(blocks_.begin(block)) + begin, *d1 = stream(blocks_.begin(block + 1)) + begin;
    load_totals<N>(totals);
    for (int64_t step = 0; step < whole; ++step) {
      fetch(next_d.done() ? next_x : next_d, 2 * blocks_.rows);
      add_mask_products<N>(d0 + step * kInner, d1 + step * kInner, row_bytes, columns(step, group * kGroup));
    }
    if (whole * kInner < width) {
      const int64_t at = whole * kInner;
      for (int64_t row = 0; row < blocks_.rows; ++row) {
        _mm512_store_si512(edge_ + row * 64, load_32(d0 + row * p_.stream_stride + at, width - at));
        _mm512_store_si512(edge_ + kTileBytes + row * 64, load_32(d1 + row * p_.stream_stride + at, width - at));
      }
      before_tile_loads();
      add_mask_products<N>(edge_, edge_ + kTileBytes, 64, columns(whole, group * kGroup));
    }
    store_totals<N>(totals);
  }

  // grad_stream (+)= mask^T grad_reads, for two blocks of writers and at most 32 columns.
  void add_stream(int64_t block, int64_t column, int64_t width, const char* right, Prefetch& next_g) {
    const char *left0 = mask_ + block * inner_ * kTileBytes, *left1 = left0 + inner_ * kTileBytes;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    before_tile_loads();
    for (int64_t k = 0; k < inner_; ++k, left0 += kTileBytes, left1 += kTileBytes, right += 2 * kTileBytes) {
      _tile_loadd(7, right, 64);
      _tile_loadd(4, left0, 64);
      _tile_dpbf16ps(0, 4, 7);
      _tile_loadd(5, left1, 64);
      _tile_dpbf16ps(2, 5, 7);
      _tile_loadd(7, right + kTileBytes, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
    fetch(next_g, 2 * blocks_.rows * int64_t(sizeof(G)) / 2);
    _tile_stored(0, sums_, 64);
    _tile_stored(1, sums_ + kTileBytes, 64);
    store(block, column, width, sums_);
    _tile_stored(2, sums_ + 2 * kTileBytes, 64);
    _tile_stored(3, sums_ + 3 * kTileBytes, 64);
    store(block + 1, column, width, sums_ + 2 * kTileBytes);
  }

  void store(int64_t block, int64_t column, int64_t width, const char* from) const {
    for (int64_t row = blocks_.repeated(block); row < blocks_.rows; ++row)
      add_row(grad_stream(blocks_.begin(block) + row) + column, width, _mm512_load_ps(from + row * 64),
              _mm512_load_ps(from + kTileBytes + row * 64));
  }

  FC_INLINE void add_row(Bf16* g, int64_t width, __m512 low, __m512 high) const {
    if (p_.accumulate) {
      __m512 low_before, high_before;
      load_wide(g, width, low_before, high_before);
      low = _mm512_add_ps(low, low_before), high = _mm512_add_ps(high, high_before);
    }
    store_32(g, narrow(low, high), width);
  }

  FC_INLINE void add_row(float* g, int64_t width, __m512 low, __m512 high) const {
    const __mmask16 in_low = width >= kSums ? 0xffff : (1u << width) - 1;
    const __mmask16 in_high = width >= kInner ? 0xffff : width <= kSums ? 0 : (1u << (width - kSums)) - 1;
    if (p_.accumulate) {
      low = _mm512_add_ps(low, _mm512_maskz_loadu_ps(in_low, g));
      high = _mm512_add_ps(high, _mm512_maskz_loadu_ps(in_high, g + kSums));
    }
    _mm512_mask_storeu_ps(g, in_low, low);
    _mm512_mask_storeu_ps(g + kSums, in_high, high);
  }

  // grad_mask[reader, writer] += totals, which begin again.
  void add_totals() {
    const int64_t bytes = blocks_.count * groups_ * kGroup * kTileBytes;
    for (int64_t block = 0; block < blocks_.count; ++block)
      for (int64_t row = blocks_.repeated(block); row < blocks_.rows; ++row)
        for (int64_t r = 0; r < p_.readers; ++r) {
          const int64_t tile = r / kTileRows, group = tile / kGroup;
          const int64_t at = (block / 2 * 2 * groups_ + 2 * group + block % 2) * kGroup + tile % kGroup;
          const float* from = reinterpret_cast<const float*>(totals_ + at * kTileBytes + row * 64);
          grad_mask_[r * p_.writers + blocks_.begin(block) + row] += from[r % kTileRows];
        }
    std::memset(totals_, 0, bytes);
  }

  const BackwardParams& p_;
  double* const grad_mask_;
  const EqualBlocks blocks_;  // of writers
  const int64_t reader_pairs_, groups_, parts_;
  const int64_t inner_;  // tiles the sum over the readers and parts takes
  char *mask_, *pairs_, *columns_, *totals_, *edge_, *sums_;
};

}  // namespace FC_ISA
}  // namespace fastcircuit
