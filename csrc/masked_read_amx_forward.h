// The forward kernel on matrix tiles: reads[R, 32 columns] = base + mask[R, W] stream[W, 32 columns]. Panels of the stream
// become right factors while the one before is multiplied, so that reading memory hides behind the products.
#pragma once

#include "amx.h"

namespace fastcircuit {
namespace FC_ISA {

constexpr int64_t kMostPanelColumns = 1024, kReadPanelBytes = 512 * 1024;
constexpr int64_t kReadPanelsPerRange = 4;  // at least: nothing hides the copy of the first one
// Reads written around the cache go in runs of this many columns, which memory takes faster than a cache line of each
// row at a time.
constexpr int64_t kRunColumns = 256;

// To right factors: to[columns / 32][pitch][64 bytes], and half a step further on the other half of the columns.
using TilePairCopy = PairCopy<kInner, 64>;

// sums[2 block + half] += left[block] right[half], for N <= 3 blocks of readers; the right factor that a block ends with
// is the next one's first.
template <int N>
FC_INLINE void add_products(const char* left, const char* right, int64_t half) {
  _tile_loadd(6, left, 64);
  _tile_loadd(7, right, 64);
  _tile_dpbf16ps(0, 6, 7);
  _tile_loadd(7, right + half, 64);
  _tile_dpbf16ps(1, 6, 7);
  if constexpr (N > 1) {
    _tile_loadd(6, left + kTileBytes, 64);
    _tile_dpbf16ps(3, 6, 7);
    _tile_loadd(7, right, 64);
    _tile_dpbf16ps(2, 6, 7);
  }
  if constexpr (N > 2) {
    _tile_loadd(6, left + 2 * kTileBytes, 64);
    _tile_dpbf16ps(4, 6, 7);
    _tile_loadd(7, right + half, 64);
    _tile_dpbf16ps(5, 6, 7);
  }
}

// The same for two blocks, where tile 6 is a right factor too: nothing is loaded twice.
FC_INLINE void add_products_of_two(const char* left, const char* right, int64_t half) {
  _tile_loadd(4, left, 64);
  _tile_loadd(6, right, 64);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(7, right + half, 64);
  _tile_dpbf16ps(1, 4, 7);
  _tile_loadd(5, left + kTileBytes, 64);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

class Read {
 public:
  static int64_t scratch(const ReadParams& p) { return Read(p).layout(nullptr); }

  static void range(const ReadParams& p, const void* mask, void* scratch, int64_t begin, int64_t end) {
    Read read(p);
    std::memset(scratch, 0, read.layout(static_cast<char*>(scratch)));
    read.put_mask(static_cast<const float*>(mask));
    while (read.panel_ > kInner && end - begin < kReadPanelsPerRange * read.panel_) read.panel_ /= 2;
    const Tiles tiles(read.blocks_.rows, read.in_twos_ ? 2 : 1);
    read.begin_copy(begin, end);
    for (; begin < end; begin += read.panel_) read.panel(begin, end);
    _mm_sfence();
  }

 private:
  explicit Read(const ReadParams& p)
      : p_(p), blocks_(p.readers, (p.readers + kTileRows - 1) / kTileRows), inner_((p.writers + kInner - 1) / kInner),
        parts_(mask_parts(p.mask_dtype, Dtype::bf16)), in_twos_(blocks_.count % 2 == 0), pace_(pairs_per_product()) {
    while (panel_ < kMostPanelColumns && 2 * panel_ * p.writers * int64_t(sizeof(Bf16)) <= kReadPanelBytes) panel_ *= 2;
  }

  // Points into the scratch memory; returns its size.
  int64_t layout(char* scratch) {
    const int64_t left_bytes = inner_ * parts_ * blocks_.count * kTileBytes;
    const int64_t right_bytes = panel_ / kInner * step_bytes();
    left_ = scratch;
    right_ = left_ + left_bytes;
    other_ = right_ + right_bytes;
    sums_ = other_ + right_bytes;
    runs_ = reinterpret_cast<Bf16*>(sums_ + 2 * kTileBytes);
    const int64_t run_bytes = around_ ? p_.readers * kRunColumns * int64_t(sizeof(Bf16)) : 0;
    return left_bytes + 2 * right_bytes + 2 * kTileBytes + run_bytes;
  }

  // Right factors of 32 columns, [half][inner].
  int64_t step_bytes() const { return 2 * inner_ * kTileBytes; }

  // Copies of the next panel that one panel's products make room for.
  int64_t pairs_per_product() const {
    const int64_t group = in_twos_ ? 2 : 3, products = inner_ * parts_ * ((blocks_.count + group - 1) / group);
    return products > 0 ? 1 + p_.writers / 2 / products : 1;
  }

  // The mask as left factors [inner][part][block].
  char* left(int64_t inner, int64_t part, int64_t block) const {
    return left_ + ((inner * parts_ + part) * blocks_.count + block) * kTileBytes;
  }

  void put_mask(const float* mask) {
    for (int64_t block = 0; block < blocks_.count; ++block)
      for (int64_t row = 0; row < blocks_.rows; ++row)
        for (int64_t w = 0; w < p_.writers; ++w) {
          Bf16 parts[kMaxParts];
          split(mask[(blocks_.begin(block) + row) * p_.writers + w], parts);
          for (int64_t i = 0; i < parts_; ++i)
            std::memcpy(left(w / kInner, i, block) + row * 64 + w % kInner * 2, &parts[i], sizeof(Bf16));
        }
  }

  const Bf16* stream(int64_t w) const { return static_cast<const Bf16*>(p_.stream) + w * p_.stream_stride; }

  void begin_copy(int64_t begin, int64_t end) {
    const int64_t width = end - begin < panel_ ? end - begin : panel_;
    copy_ = width < kInner ? TilePairCopy()
                           : TilePairCopy(stream(0) + begin, p_.stream_stride, p_.writers / 2, width / kInner, other_,
                                          2 * inner_ * kTileRows, inner_ * kTileBytes);
  }

  // What the copy of a panel leaves: a last row without another one, and the columns of an incomplete step.
  void finish_copy(int64_t begin, int64_t stop) {
    copy_.finish();
    char* to = other_;
    for (int64_t c = begin; c < stop; c += kInner, to += step_bytes())
      for (int64_t w = stop - c < kInner ? 0 : p_.writers / 2 * 2; w < p_.writers; w += 2) {
        const __m512i second = w + 1 < p_.writers ? load_32(stream(w + 1) + c, stop - c) : _mm512_setzero_si512();
        const Pairs pairs = pair_up(load_32(stream(w) + c, stop - c), second);
        _mm512_store_si512(to + w / 2 * 64, pairs.half[0]);
        _mm512_store_si512(to + w / 2 * 64 + inner_ * kTileBytes, pairs.half[1]);
      }
    char* const done = right_;
    right_ = other_, other_ = done;
  }

  void panel(int64_t begin, int64_t end) {
    const int64_t next = begin + panel_, stop = next < end ? next : end;
    finish_copy(begin, stop);
    begin_copy(stop, end);
    const char* right = right_;
    for (; begin < stop; begin += kInner, right += step_bytes()) {
      const int64_t width = stop - begin < kInner ? stop - begin : kInner;
      int64_t block = 0;
      for (; in_twos_ && block < blocks_.count; block += 2) multiply<2, true>(block, right, begin, width);
      for (; block + 3 <= blocks_.count; block += 3) multiply<3>(block, right, begin, width);
      if (blocks_.count - block == 2) multiply<2>(block, right, begin, width);
      if (blocks_.count - block == 1) multiply<1>(block, right, begin, width);
      const int64_t end_of_run = begin + width;
      if (around_ && (run_ += width, run_ == kRunColumns || end_of_run >= stop)) {
        write_run(end_of_run - run_, run_);
        run_ = 0;
      }
    }
  }

  template <int N, bool InTwos = false>
  void multiply(int64_t block, const char* right, int64_t begin, int64_t width) {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (N > 1) {
      _tile_zero(2);
      _tile_zero(3);
    }
    if constexpr (N > 2) {
      _tile_zero(4);
      _tile_zero(5);
    }
    TilePairCopy copy = copy_;  // a member would be written back at every step
    const char* factors = left(0, 0, block);
    for (int64_t k = 0; k < inner_; ++k, right += kTileBytes)
      for (int64_t i = 0; i < parts_; ++i, factors += blocks_.count * kTileBytes) {
        for (int64_t step = 0; step < pace_; ++step) copy.step();
        before_tile_loads();
        if constexpr (InTwos) {
          add_products_of_two(factors, right, inner_ * kTileBytes);
        } else {
          add_products<N>(factors, right, inner_ * kTileBytes);
        }
      }
    copy_ = copy;
    __m512 base[2] = {};
    if (p_.base) load_wide(static_cast<const Bf16*>(p_.base) + begin, width, base[0], base[1]);
    _tile_stored(0, sums_, 64);
    _tile_stored(1, sums_ + kTileBytes, 64);
    store(block, begin, width, base);
    if constexpr (N > 1) {
      _tile_stored(2, sums_, 64);
      _tile_stored(3, sums_ + kTileBytes, 64);
      store(block + 1, begin, width, base);
    }
    if constexpr (N > 2) {
      _tile_stored(4, sums_, 64);
      _tile_stored(5, sums_ + kTileBytes, 64);
      store(block + 2, begin, width, base);
    }
  }

  void store(int64_t block, int64_t begin, int64_t width, const __m512 (&base)[2]) const {
    const int64_t stride = around_ ? kRunColumns : p_.reads_stride;
    Bf16* to = (around_ ? runs_ + run_ : static_cast<Bf16*>(p_.reads) + begin) + blocks_.begin(block) * stride;
    for (int64_t row = 0; row < blocks_.rows; ++row, to += stride) {
      const char* from = sums_ + row * 64;
      const __m512 low = _mm512_add_ps(_mm512_load_ps(from), base[0]);
      store_32(to, narrow(low, _mm512_add_ps(_mm512_load_ps(from + kTileBytes), base[1])), width);
    }
  }

  void write_run(int64_t begin, int64_t width) const {
    for (int64_t r = 0; r < p_.readers; ++r) {
      const Bf16* from = runs_ + r * kRunColumns;
      Bf16* to = static_cast<Bf16*>(p_.reads) + r * p_.reads_stride + begin;
      for (int64_t c = 0; c < width; c += kInner)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to + c), _mm512_load_si512(from + c));
    }
  }

  const ReadParams& p_;
  const EqualBlocks blocks_;  // of readers
  const int64_t inner_, parts_;
  const bool in_twos_;          // blocks
  const int64_t pace_;          // pairs copied per product
  int64_t panel_ = 2 * kInner;  // columns
  char *left_, *right_, *other_, *sums_;
  TilePairCopy copy_;  // of the next panel
  Bf16* runs_;       // reads on their way around the cache, [readers, kRunColumns]
  int64_t run_ = 0;  // columns there
  const bool around_ = p_.columns % kInner == 0 &&
                       goes_around_cache(p_.reads, p_.readers, p_.reads_stride * int64_t(sizeof(Bf16)));
};

}  // namespace FC_ISA
}  // namespace fastcircuit
