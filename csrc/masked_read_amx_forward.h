// The forward kernel on matrix tiles: reads[R, 32 columns] = base + mask[R, W] stream[W, 32 columns].
#pragma once

#include "amx.h"
#include "prefetch.h"

namespace fastcircuit {
namespace FC_ISA {

constexpr int64_t kMostPanelColumns = 1024, kReadPanelBytes = 512 * 1024;
// Reads larger than this do not stay in cache anyway, so they are written around it.
constexpr int64_t kAroundBytes = 4 << 20;

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
        parts_(mask_parts(p.mask_dtype, Dtype::bf16)) {
    while (panel_ < kMostPanelColumns && 2 * panel_ * p.writers * int64_t(sizeof(Bf16)) <= kReadPanelBytes) panel_ *= 2;
  }

  // Points into the scratch memory; returns its size.
  int64_t layout(char* scratch) {
    const int64_t left_bytes = inner_ * parts_ * blocks_.count * kTileBytes, right_bytes = inner_ * 2 * kTileBytes;
    left_ = scratch;
    right_ = left_ + left_bytes;
    sums_ = right_ + right_bytes;
    return left_bytes + right_bytes + 2 * kTileBytes;
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
    Prefetch ahead(static_cast<const Bf16*>(p_.stream) + next, p_.stream_stride, p_.writers,
                   end - next < panel_ ? end - next : panel_);
    for (; begin < stop; begin += kInner) {
      const int64_t width = stop - begin < kInner ? stop - begin : kInner;
      put_stream(begin, width, ahead);
      int64_t block = 0;
      for (; block + kGroup <= blocks_.count; block += kGroup) multiply<3>(block, begin, width);
      if (blocks_.count - block == 2) multiply<2>(block, begin, width);
      if (blocks_.count - block == 1) multiply<1>(block, begin, width);
    }
  }

  // 32 columns of the stream as right factors [inner][half].
  void put_stream(int64_t begin, int64_t width, Prefetch& prefetch) {
    const Bf16* from = static_cast<const Bf16*>(p_.stream) + begin;
    Prefetch ahead = prefetch;
    for (int64_t w = 0; w < p_.writers; w += 2, from += 2 * p_.stream_stride) {
      ahead.step();
      ahead.step();
      const __m512i second = w + 1 < p_.writers ? load_32(from + p_.stream_stride, width) : _mm512_setzero_si512();
      const Pairs pairs = pair_up(load_32(from, width), second);
      char* to = right_ + w / kInner * 2 * kTileBytes + w % kInner / 2 * 64;
      _mm512_store_si512(to, pairs.half[0]);
      _mm512_store_si512(to + kTileBytes, pairs.half[1]);
    }
    prefetch = ahead;
  }

  template <int N>
  void multiply(int64_t block, int64_t begin, int64_t width) {
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
      for (int64_t i = 0; i < parts_; ++i) add_products<N>(left(k, i, block), right_ + 2 * k * kTileBytes);
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
    Bf16* to = static_cast<Bf16*>(p_.reads) + blocks_.begin(block) * p_.reads_stride + begin;
    for (int64_t row = 0; row < blocks_.rows; ++row, to += p_.reads_stride) {
      const char* from = sums_ + row * 64;
      const __m512i v = narrow(_mm512_load_ps(from), _mm512_load_ps(from + kTileBytes));
      if (around_ && width == kInner) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to), v);
      } else {
        store_32(to, v, width);
      }
    }
  }

  bool writes_around_cache() const {
    const int64_t row_bytes = p_.reads_stride * int64_t(sizeof(Bf16));
    return p_.readers * row_bytes >= kAroundBytes && row_bytes % 64 == 0 &&
           reinterpret_cast<uintptr_t>(p_.reads) % 64 == 0;
  }

  const ReadParams& p_;
  const EqualBlocks blocks_;  // of readers
  const int64_t inner_, parts_;
  int64_t panel_ = 2 * kInner;  // columns fetched ahead
  char *left_, *right_, *sums_;
  const bool around_ = writes_around_cache();
};

}  // namespace FC_ISA
}  // namespace fastcircuit
