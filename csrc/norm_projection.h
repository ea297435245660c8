// A norm and the per-head projection after it, y_h = norm(x_h) W_h + b_h, and the gradient of x: what lies between the
// two never leaves the cache.
#pragma once

#include <cstdint>

#include "types.h"

namespace fastcircuit {

// Strides are in elements; float32 and float64.
struct NormProjectionParams {
  Dtype dtype;
  bool centered;  // LayerNorm
  int64_t heads, tokens, width, head_width;
  const void* x;  // [heads, tokens, width], rows contiguous
  int64_t x_head_stride, x_row_stride;
  const void *norm_weight, *norm_bias;  // [width]; no bias: null
  double eps;
  const void* weight;  // [heads, width, head_width]
  int64_t weight_head_stride, weight_in_stride, weight_out_stride;
  const void* bias;  // [heads, head_width] with this stride between heads, forward; null: zero
  int64_t bias_head_stride;
  void* y;           // [heads, tokens, head_width], forward
  const void* grad;  // of y, backward
  void* grad_x;      // [heads, tokens, width], backward
  int threads;
  Isa isa;
};

void norm_projection(const NormProjectionParams& params);
void norm_projection_backward(const NormProjectionParams& params);

// What one thread does to tokens [begin, end) of one head; `scratch` has the size *_scratch says, 64-byte aligned.
using NormProjectionRange = void (*)(const NormProjectionParams&, int64_t head, int64_t begin, int64_t end,
                                     void* scratch);

// The kernels of one instruction set for one dtype and one of the two norms.
struct NormProjectionKernels {
  int64_t (*forward_scratch)(const NormProjectionParams&);
  NormProjectionRange forward;
  int64_t (*backward_scratch)(const NormProjectionParams&);
  NormProjectionRange backward;
};

namespace portable {
const NormProjectionKernels& norm_projection_kernels(Dtype dtype, bool centered);
}
namespace avx2 {
const NormProjectionKernels& norm_projection_kernels(Dtype dtype, bool centered);
}
namespace avx512 {
const NormProjectionKernels& norm_projection_kernels(Dtype dtype, bool centered);
}

}  // namespace fastcircuit
