// x_r = base + sum_w z_rw D_w over rows of `columns` numbers, and its two gradients. Pointers, shapes, strides.
#pragma once

#include <cstdint>

#include "types.h"

namespace fastcircuit {

// Strides are in elements. Rows are contiguous; only the distance between them is free.
struct ReadParams {
  Dtype dtype, mask_dtype;
  int mask_parts;  // set by masked_read: of every number of the mask, where it is multiplied in pairs
  int64_t readers, writers, columns;
  const void* stream;
  int64_t stream_stride;
  const void* mask;
  int64_t mask_stride_reader, mask_stride_writer;
  const void* base;  // null: zero
  void* reads;
  int64_t reads_stride;
  int threads;
  Isa isa;
};

struct BackwardParams {
  Dtype dtype, mask_dtype, grad_stream_dtype;
  int mask_parts;  // as above
  int64_t readers, writers, columns;
  const void* grad_reads;
  int64_t grad_reads_stride;
  const void* stream;
  int64_t stream_stride;
  const void* mask;
  int64_t mask_stride_reader, mask_stride_writer;
  void* grad_stream;  // null: not wanted
  int64_t grad_stream_stride;
  bool accumulate;  // add to grad_stream instead of overwriting it
  void* grad_mask;  // contiguous [readers, writers] in mask_dtype; null: not wanted
  int threads;
  Isa isa;
};

// `total` rows in as few blocks of at most `most` as there can be, of sizes that differ by one at most: a block of one
// or two rows would be multiplied at a fraction of the speed.
struct RowBlocks {
  int64_t total, count;

  RowBlocks(int64_t total, int64_t most) : total(total), count((total + most - 1) / most) {}
  int64_t begin(int64_t block) const { return total * block / count; }
  int64_t rows(int64_t block) const { return begin(block + 1) - begin(block); }
};

void masked_read(ReadParams params);
void masked_read_backward(BackwardParams params);

// What one thread does to columns [begin, end). `panels` is the mask in the order the tiles read it, in the
// accumulation type or in pairs of bfloat16; `scratch` has the size the matching *_scratch function asks for, 64-byte aligned.
using ReadRange = void (*)(const ReadParams&, const void* panels, void* scratch, int64_t begin, int64_t end);
using BackwardRange = void (*)(const BackwardParams&, const void* panels, void* scratch, double* grad_mask,
                               int64_t begin, int64_t end);

// The kernels of one instruction set for one stream dtype.
struct Kernels {
  int64_t tile_columns;  // ranges start at multiples of this
  int64_t panel_rows;    // the most rows of the mask interleaved in one panel
  bool in_pairs;         // panels hold pairs of the index summed over, once for each part
  int64_t (*read_scratch)(const ReadParams&);
  ReadRange read;
  int64_t (*backward_scratch)(const BackwardParams&);
  BackwardRange backward;
};

namespace portable {
const Kernels& kernels(Dtype stream, Dtype grad_stream);
}
namespace avx2 {
const Kernels& kernels(Dtype stream, Dtype grad_stream);
}
namespace avx512 {
const Kernels& kernels(Dtype stream, Dtype grad_stream);
}
namespace avx512_bf16 {
const Kernels& kernels(Dtype stream, Dtype grad_stream);  // of bfloat16 alone, and of more than two readers
}
namespace amx {
const Kernels& kernels(Dtype stream, Dtype grad_stream);  // of bfloat16 alone
}

}  // namespace fastcircuit
