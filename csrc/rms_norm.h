// y = x * rstd * weight with rstd = 1 / sqrt(mean(x^2) + eps) over rows of `width` numbers, and the gradient of x.
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

struct RmsNormParams {
  Dtype dtype;
  int64_t rows, width;
  RowView x;
  const void* weight;  // [width]
  double eps;
  void* y;       // [rows, width], forward
  RowView grad;  // of y, backward
  void* grad_x;  // [rows, width], backward
  int threads;
  Isa isa;
};

void rms_norm(const RmsNormParams& params);
void rms_norm_backward(const RmsNormParams& params);

// What one thread does to rows [begin, end).
using RmsNormRange = void (*)(const RmsNormParams&, int64_t begin, int64_t end);

// The kernels of one instruction set for one dtype.
struct RmsNormKernels {
  RmsNormRange forward, backward;
};

namespace portable {
const RmsNormKernels& rms_norm_kernels(Dtype dtype);
}
namespace avx2 {
const RmsNormKernels& rms_norm_kernels(Dtype dtype);
}
namespace avx512 {
const RmsNormKernels& rms_norm_kernels(Dtype dtype);
}

}  // namespace fastcircuit
