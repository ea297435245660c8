// RMSNorm, y = x * rstd * weight with rstd = 1 / sqrt(mean(x^2) + eps) over rows of `width` numbers, and LayerNorm,
// the same of x - mean(x), plus a bias; and the gradients of x.
#pragma once

#include <cstdint>

#include "types.h"

namespace fastcircuit {

// Rows of contiguous numbers in groups, as slices and splits leave them; strides are in elements:
// row i lies at data + (i / group) * group_stride + (i % group) * row_stride.
struct RowView {
  const void* data;
  int64_t group, group_stride, row_stride;
};

struct NormParams {
  Dtype dtype;
  bool centered;  // LayerNorm
  int64_t rows, width;
  RowView x;
  const void* weight;  // [width]
  const void* bias;    // [width], forward; null: zero
  double eps;
  void* y;       // [rows, width], forward
  RowView grad;  // of y, backward
  void* grad_x;  // [rows, width], backward; may be where grad lies
  int threads;
  Isa isa;
};

void norm(const NormParams& params);
void norm_backward(const NormParams& params);

// What one thread does to rows [begin, end).
using NormRange = void (*)(const NormParams&, int64_t begin, int64_t end);

// The kernels of one instruction set for one dtype and one of the two norms.
struct NormKernels {
  NormRange forward, backward;
};

namespace portable {
const NormKernels& norm_kernels(Dtype dtype, bool centered);
}
namespace avx2 {
const NormKernels& norm_kernels(Dtype dtype, bool centered);
}
namespace avx512 {
const NormKernels& norm_kernels(Dtype dtype, bool centered);
}

}  // namespace fastcircuit
