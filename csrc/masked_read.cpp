// What is the same for every instruction set: laying out the mask, splitting the columns over threads, adding up.
#include "masked_read.h"

#include <algorithm>
#include <cstring>

#include "isa.h"
#include "mask_parts.h"
#include "threads.h"

namespace fastcircuit {
namespace {

// Below this many multiply-adds a thread costs more to wake than it saves.
constexpr int64_t kWorkPerThread = 1 << 16;
constexpr int kRangesPerThread = 8;

// With fewer readers most of a matrix tile is empty, and memory is the limit anyway.
constexpr int64_t kTileReaders = 8;
constexpr int64_t kPairReaders = 3;  // fewer stream their rows, in the accumulation type

const Kernels& kernels_for(Isa isa, int64_t readers, Dtype stream, Dtype grad_stream) {
#ifdef FC_AVX512_BF16
  if (isa == Isa::avx512_bf16 && stream == Dtype::bf16 && readers >= kPairReaders)
    return avx512_bf16::kernels(stream, grad_stream);
#endif
#ifdef FC_AMX
  if (isa == Isa::amx && stream == Dtype::bf16 && readers >= kTileReaders) return amx::kernels(stream, grad_stream);
#endif
  (void)readers;
#ifdef FC_X86_VARIANTS
  if (isa >= Isa::avx512) return avx512::kernels(stream, grad_stream);
  if (isa == Isa::avx2) return avx2::kernels(stream, grad_stream);
#endif
  (void)isa;
  return portable::kernels(stream, grad_stream);
}

double mask_value(const void* mask, Dtype dtype, int64_t at) {
  if (dtype == Dtype::f64) return static_cast<const double*>(mask)[at];
  if (dtype == Dtype::f32) return static_cast<const float*>(mask)[at];
  const uint32_t bits = uint32_t(static_cast<const uint16_t*>(mask)[at]) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// In how many bfloat16 parts the mask has to be multiplied: masks of a circuit, all 0 or 1, are one whatever their type.
template <class P>
int parts_needed(const P& p, Dtype result) {
  const int most = mask_parts(p.mask_dtype, result);
  int needed = 1;
  for (int64_t r = 0; r < p.readers; ++r)
    for (int64_t w = 0; w < p.writers && needed < most; ++w) {
      Bf16 parts[kMaxParts];
      split(float(mask_value(p.mask, p.mask_dtype, r * p.mask_stride_reader + w * p.mask_stride_writer)), parts);
      while (needed < most && parts[needed].bits != 0) ++needed;
    }
  return needed;
}

void set_mask_value(void* mask, Dtype dtype, int64_t at, double value) {
  if (dtype == Dtype::f64) {
    static_cast<double*>(mask)[at] = value;
  } else if (dtype == Dtype::f32) {
    static_cast<float*>(mask)[at] = float(value);
  } else {
    const float narrow = float(value);
    uint32_t bits;
    std::memcpy(&bits, &narrow, sizeof bits);
    const bool is_nan = narrow != narrow;
    static_cast<uint16_t*>(mask)[at] = is_nan ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
}

// panels[block][inner][row of the block]: blocks of at most `panel_rows` of the outer index.
template <class A>
void fill_panels(const void* mask, Dtype dtype, int64_t outer, int64_t outer_stride, int64_t inner,
                 int64_t inner_stride, int64_t panel_rows, A* panels) {
  const RowBlocks blocks(outer, panel_rows);
  for (int64_t block = 0; block < blocks.count; ++block)
    for (int64_t i = 0; i < inner; ++i)
      for (int64_t o = blocks.begin(block); o < blocks.begin(block + 1); ++o)
        *panels++ = A(mask_value(mask, dtype, o * outer_stride + i * inner_stride));
}

// panels[block][pair][part][row of the block]: of two numbers of the inner index, as one of the parts they are sums of.
void fill_pairs(const void* mask, Dtype dtype, int64_t outer, int64_t outer_stride, int64_t inner, int64_t inner_stride,
                int64_t panel_rows, int parts, Bf16* panels) {
  const RowBlocks blocks(outer, panel_rows);
  for (int64_t block = 0; block < blocks.count; ++block)
    for (int64_t i = 0; i < inner + inner % 2; ++i)
      for (int64_t row = 0, rows = blocks.rows(block); row < rows; ++row) {
        const int64_t o = blocks.begin(block) + row;
        Bf16 split_up[kMaxParts];
        split(i < inner ? float(mask_value(mask, dtype, o * outer_stride + i * inner_stride)) : 0.0f, split_up);
        Bf16* const to = panels + blocks.begin(block) * (inner + inner % 2) * parts;
        for (int part = 0; part < parts; ++part) to[2 * ((i / 2 * parts + part) * rows + row) + i % 2] = split_up[part];
      }
}

// The mask [outer, inner] as the kernels read it.
struct Panels {
  template <class P>
  Panels(const Kernels& k, const P& p, int64_t outer, int64_t outer_stride, int64_t inner, int64_t inner_stride)
      : memory(outer * (inner + 1) * int64_t(sizeof(double))) {
    if (k.in_pairs) {
      fill_pairs(p.mask, p.mask_dtype, outer, outer_stride, inner, inner_stride, k.panel_rows, p.mask_parts,
                 static_cast<Bf16*>(memory.data));
    } else if (p.dtype == Dtype::f64) {
      fill_panels(p.mask, p.mask_dtype, outer, outer_stride, inner, inner_stride, k.panel_rows,
                  static_cast<double*>(memory.data));
    } else {
      fill_panels(p.mask, p.mask_dtype, outer, outer_stride, inner, inner_stride, k.panel_rows,
                  static_cast<float*>(memory.data));
    }
  }

  const Buffer memory;
};

int useful_threads(int asked, int64_t work, int64_t tiles) {
#ifdef _OPENMP
  return int(std::max<int64_t>(1, std::min<int64_t>({asked, work / kWorkPerThread, tiles})));
#else
  (void)asked, (void)work, (void)tiles;
  return 1;
#endif
}

// More ranges than threads, so that a thread the machine holds up does not hold up the others.
int range_count(int threads, int64_t tiles) {
  return threads == 1 ? 1 : int(std::min<int64_t>(tiles, int64_t(threads) * kRangesPerThread));
}

// Calls body(range, thread, begin, end) for consecutive ranges of the columns that start at multiples of `tile`.
template <class Body>
void for_column_ranges(int threads, int ranges, int64_t columns, int64_t tile, const Body& body) {
  const int64_t tiles = (columns + tile - 1) / tile;
  const auto run = [&](int64_t range) {
    const int64_t begin = tiles * range / ranges * tile;
    const int64_t end = std::min(columns, tiles * (range + 1) / ranges * tile);
    if (begin < end) body(range, this_thread(), begin, end);
  };
  if (threads == 1) return body(0, 0, 0, columns);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t range = 0; range < ranges; ++range) run(range);
}

}  // namespace

void masked_read(ReadParams p) {
  if (p.readers == 0 || p.columns == 0) return;
  const Kernels& k = kernels_for(p.isa, p.readers, p.dtype, p.dtype);
  p.mask_parts = k.in_pairs ? parts_needed(p, p.dtype) : 1;
  const Panels panels(k, p, p.readers, p.mask_stride_reader, p.writers, p.mask_stride_writer);
  const int64_t tiles = (p.columns + k.tile_columns - 1) / k.tile_columns;
  const int threads = useful_threads(p.threads, p.readers * (p.writers + 1) * p.columns, tiles);
  const int64_t size = round_up(k.read_scratch(p), kAlign);
  const Buffer scratch(size * threads);
  const int ranges = range_count(threads, tiles);
  for_column_ranges(threads, ranges, p.columns, k.tile_columns, [&](int64_t, int thread, int64_t begin, int64_t end) {
    k.read(p, panels.memory.data, static_cast<char*>(scratch.data) + thread * size, begin, end);
  });
}

void masked_read_backward(BackwardParams p) {
  const int64_t pairs = p.readers * p.writers;
  if (p.writers == 0 || p.columns == 0) {
    for (int64_t i = 0; p.grad_mask && i < pairs; ++i) set_mask_value(p.grad_mask, p.mask_dtype, i, 0.0);
    return;
  }
  const Kernels& k = kernels_for(p.isa, p.readers, p.dtype, p.grad_stream_dtype);
  p.mask_parts = k.in_pairs ? parts_needed(p, p.grad_stream_dtype) : 1;
  const Panels panels(k, p, p.writers, p.mask_stride_writer, p.readers, p.mask_stride_reader);
  const int64_t tiles = (p.columns + k.tile_columns - 1) / k.tile_columns;
  const int threads = useful_threads(p.threads, 2 * (p.readers + 1) * p.writers * p.columns, tiles);
  const int64_t size = round_up(k.backward_scratch(p), kAlign);
  const Buffer scratch(size * threads);
  const int64_t sums_size = round_up(pairs, kAlign);
  const int ranges = range_count(threads, tiles);
  const Buffer sums(p.grad_mask ? sums_size * ranges * int64_t(sizeof(double)) : 0);
  double* const partial = p.grad_mask ? static_cast<double*>(sums.data) : nullptr;
  if (partial) std::fill(partial, partial + sums_size * ranges, 0.0);
  const auto body = [&](int64_t range, int thread, int64_t begin, int64_t end) {
    k.backward(p, panels.memory.data, static_cast<char*>(scratch.data) + thread * size,
               partial ? partial + range * sums_size : nullptr, begin, end);
  };
  for_column_ranges(threads, ranges, p.columns, k.tile_columns, body);
  // Always in the order of the columns, whoever computed them: the same thread count gives the same bits.
  for (int64_t i = 0; partial && i < pairs; ++i) {
    double sum = 0.0;
    for (int range = 0; range < ranges; ++range) sum += partial[range * sums_size + i];
    set_mask_value(p.grad_mask, p.mask_dtype, i, sum);
  }
}

}  // namespace fastcircuit
