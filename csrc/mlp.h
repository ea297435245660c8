// The MLP of a block, act(x W + b) V + c, or gated, (act(x G + a) * (x W + b)) V + c, and the gradient of x. The
// weights are read where they are, in any layout, and copied a few columns at a time to where the caches hold them.
#pragma once

#include <cstdint>

#include "types.h"

namespace fastcircuit {

enum class Activation : int { relu = 0, silu = 1, gelu = 2, gelu_tanh = 3 };

// A weight [in, out] and its bias [out]. Strides are in elements.
struct Affine {
  const void* weight;
  int64_t in_stride, out_stride;
  const void* bias;  // null: zero
};

// float32 and float64.
struct MlpParams {
  Dtype dtype;
  Activation activation;
  bool gated;
  int64_t tokens, width, hidden;
  Affine gate, up, down;  // [width, hidden] twice, [hidden, width]; no gate unless gated
  const void* x;          // [tokens, width], rows contiguous: the input, or the gradient of the output
  int64_t x_row_stride;
  // What the gradient of the hidden numbers is multiplied by to get that of what the first products gave, the gate's
  // and the other one's, or only one: [1 or 2, tokens, hidden]. Forward: null, or written; backward: read.
  void* slopes;
  void* y;  // [tokens, width], contiguous: the output, or the gradient of the input
  int threads;
  Isa isa;
};

void mlp(const MlpParams& params);
void mlp_backward(const MlpParams& params);

// Tokens [begin, end), and the columns of a panel: of the hidden numbers, or of the result. `inner` holds the hidden
// numbers [tokens, hidden], or the gradients of what goes into them, [1 or 2, tokens, hidden].
struct MlpTask {
  int64_t begin, end, panel;
  int64_t next;  // a panel that this thread is likely to have next
  void* inner;
  void* scratch;
};

// The kernels of one instruction set for one dtype.
struct MlpKernels {
  int64_t tile;     // columns of a panel
  int64_t number;   // bytes
  int64_t scratch;  // bytes a thread needs, 64-byte aligned
  void (*forward_inner)(const MlpParams&, const MlpTask&);
  void (*forward_outer)(const MlpParams&, const MlpTask&);
  void (*backward_inner)(const MlpParams&, const MlpTask&);
  void (*backward_outer)(const MlpParams&, const MlpTask&);
};

namespace portable {
const MlpKernels& mlp_kernels(Dtype dtype);
}
namespace avx2 {
const MlpKernels& mlp_kernels(Dtype dtype);
}
namespace avx512 {
const MlpKernels& mlp_kernels(Dtype dtype);
}

}  // namespace fastcircuit
