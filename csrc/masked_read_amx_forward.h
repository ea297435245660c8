// The forward kernel on matrix tiles: reads[R, 32 columns] = base + mask[R, W] stream[W, 32 columns].
#pragma once

#include "amx.h"
#include "prefetch.h"

namespace fastcircuit {
namespace FC_ISA {

constexpr int64_t kMostPanelColumns = 1024, kReadPanelBytes = 512 * 1024;
// Reads written around the cache go in runs of this many columns, which memory takes faster than a cache line of each
// row at a time.
constexpr int64_t kRunColumns = 256;

// sums[2 block + half] += left[block] right[half], for N blocks of readers.
template <int N>
FC_INLINE void add_products(const char* left, const char* right) {
  _tile_loadd(7, right, 64);
  _tile_loadd(6, left, 64);
  _tile_dpbf16ps(0, 6, 7);
  if constexpr (N > 1) {
    _tile_loadd(6, left + kTileBytes, 64);
    _tile_dpbf16ps(2, 6, 7);
  }
  if constexpr (N > 2) {
    _tile_loadd(6, left + 2 * kTileBytes, 64);
    _tile_dpbf16ps(4, 6, 7);
  }
  _tile_loadd(7, right + kTileBytes, 64);
  _tile_loadd(6, left, 64);
  _tile_dpbf16ps(1, 6, 7);
  if constexpr (N > 1) {
    _tile_loadd(6, left + kTileBytes, 64);
    _tile_dpbf16ps(3, 6, 7);
  }
  if constexpr (N > 2) {
    _tile_loadd(6, left + 2 * kTileBytes, 64);
    _tile_dpbf16ps(5, 6, 7);
  }
}

class Read {
 public:
  static int64_t scratch(const ReadParams& p) { return Read(p).layout(nullptr); }

  static void range(const ReadParams& p, const void* mask, void* scratch, int64_t begin, int64_t end) {
    Read read(p);
    std::memset(scratch, 0, read.layout(static_cast<char*>(scratch)));
    read.put_mask(static_cast<const float*>(mask));
    const Tiles tiles(read.blocks_.rows);
    for (; begin < end; begin += read.panel_) read.panel(begin, end);
    _mm_sfence();
  }

 private:
  static constexpr int64_t kGroup = 3;  // blocks of readers that share a load of the stream

  explicit Read(const ReadParams& p)
      : p_(p), blocks_(p.readers, (p.readers + kTileRows - 1) / kTileRows), inner_((p.writers + kInner - 1) / kInner),
        parts_(mask_parts(p.mask_dtype, Dtype::bf16)),
        lines_per_product_(inner_ > 0 ? 1 + kInner / (parts_ * ((blocks_.count + kGroup - 1) / kGroup)) : 0) {
    while (panel_ < kMostPanelColumns && 2 * panel_ * p.writers * int64_t(sizeof(Bf16)) <= kReadPanelBytes) panel_ *= 2;
  }

  // Points into the scratch memory; returns its size.
  int64_t layout(char* scratch) {
    const int64_t left_bytes = inner_ * parts_ * blocks_.count * kTileBytes;
    const int64_t right_bytes = panel_ / kInner * inner_ * 2 * kTileBytes;
    left_ = scratch;
    right_ = left_ + left_bytes;
    sums_ = right_ + right_bytes;
    runs_ = reinterpret_cast<Bf16*>(sums_ + 2 * kTileBytes);
    const int64_t run_bytes = around_ ? p_.readers * kRunColumns * int64_t(sizeof(Bf16)) : 0;
    return left_bytes + right_bytes + 2 * kTileBytes + run_bytes;
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

  void panel(int64_t begin, int64_t end) {
    const int64_t next = begin + panel_, stop = next < end ? next : end;
    put_stream(begin, stop);
    Prefetch ahead(static_cast<const Bf16*>(p_.stream) + next, p_.stream_stride, p_.writers,
                   end - next < panel_ ? end - next : panel_);
    const char* right = right_;
    for (; begin < stop; begin += kInner, right += inner_ * 2 * kTileBytes) {
      const int64_t width = stop - begin < kInner ? stop - begin : kInner;
      int64_t block = 0;
      for (; block + kGroup <= blocks_.count; block += kGroup) multiply<3>(block, right, begin, width, ahead);
      if (blocks_.count - block == 2) multiply<2>(block, right, begin, width, ahead);
      if (blocks_.count - block == 1) multiply<1>(block, right, begin, width, ahead);
      const int64_t end_of_run = begin + width;
      if (around_ && (run_ += width, run_ == kRunColumns || end_of_run >= stop)) {
        write_run(end_of_run - run_, run_);
        run_ = 0;
      }
    }
  }

  // Columns of the stream as right factors [step][inner][half], a few rows at a time along the whole panel: going down
  // all rows for every step would look up a page for each, and rows a power of two apart share few places to look.
  void put_stream(int64_t begin, int64_t stop) const {
    for (int64_t first = 0; first < p_.writers; first += Prefetch::kTogether) {
      const int64_t last = first + Prefetch::kTogether < p_.writers ? first + Prefetch::kTogether : p_.writers;
      char* to = right_ + first / kInner * 2 * kTileBytes + first % kInner / 2 * 64;
      for (int64_t c = begin; c < stop; c += kInner, to += inner_ * 2 * kTileBytes)
        for (int64_t w = first; w < last; w += 2) put_pair(w, c, stop - c, to + (w - first) / 2 * 64);
    }
  }

  FC_INLINE void put_pair(int64_t w, int64_t column, int64_t width, char* to) const {
    const Bf16* from = static_cast<const Bf16*>(p_.stream) + w * p_.stream_stride + column;
    const __m512i second = w + 1 < p_.writers ? load_32(from + p_.stream_stride, width) : _mm512_setzero_si512();
    const Pairs pairs = pair_up(load_32(from, width), second);
    _mm512_store_si512(to, pairs.half[0]);
    _mm512_store_si512(to + kTileBytes, pairs.half[1]);
  }

  template <int N>
  void multiply(int64_t block, const char* right, int64_t begin, int64_t width, Prefetch& ahead) {
    alignas(64) float base[kInner] = {};
    if (p_.base) {
      __m512 low, high;
      load_wide(static_cast<const Bf16*>(p_.base) + begin, width, low, high);
      _mm512_store_ps(base, low);
      _mm512_store_ps(base + kSums, high);
    }
    before_tile_loads();
    _tile_loadd(0, base, 0);  // every row begins with the base
    _tile_loadd(1, base + kSums, 0);
    if constexpr (N > 1) {
      _tile_loadd(2, base, 0);
      _tile_loadd(3, base + kSums, 0);
    }
    if constexpr (N > 2) {
      _tile_loadd(4, base, 0);
      _tile_loadd(5, base + kSums, 0);
    }
    for (int64_t k = 0; k < inner_; ++k)
      for (int64_t i = 0; i < parts_; ++i) {
        fetch(ahead, lines_per_product_);
        add_products<N>(left(k, i, block), right + 2 * k * kTileBytes);
      }
    _tile_stored(0, sums_, 64);
    _tile_stored(1, sums_ + kTileBytes, 64);
    store(block, begin, width);
    if constexpr (N > 1) {
      _tile_stored(2, sums_, 64);
      _tile_stored(3, sums_ + kTileBytes, 64);
      store(block + 1, begin, width);
    }
    if constexpr (N > 2) {
      _tile_stored(4, sums_, 64);
      _tile_stored(5, sums_ + kTileBytes, 64);
      store(block + 2, begin, width);
    }
  }

  void store(int64_t block, int64_t begin, int64_t width) const {
    const int64_t stride = around_ ? kRunColumns : p_.reads_stride;
    Bf16* to = (around_ ? runs_ + run_ : static_cast<Bf16*>(p_.reads) + begin) + blocks_.begin(block) * stride;
    for (int64_t row = 0; row < blocks_.rows; ++row, to += stride) {
      const char* from = sums_ + row * 64;
      store_32(to, narrow(_mm512_load_ps(from), _mm512_load_ps(from + kTileBytes)), width);
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
  const int64_t lines_per_product_;  // fetched ahead
  int64_t panel_ = 2 * kInner;       // columns
  char *left_, *right_, *sums_;
  Bf16* runs_;       // reads on their way around the cache, [readers, kRunColumns]
  int64_t run_ = 0;  // columns there
  const bool around_ = p_.columns % kInner == 0 &&
                       goes_around_cache(p_.reads, p_.readers, p_.reads_stride * int64_t(sizeof(Bf16)));
};

}  // namespace FC_ISA
}  // namespace fastcircuit
