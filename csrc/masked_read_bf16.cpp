// masked_read with products of bfloat16 pairs, for a bfloat16 stream.
#include "bf16_products.h"
#include "masked_read_backward.h"
#include "masked_read_forward.h"

namespace fastcircuit {
namespace FC_ISA {

template <class G>
constexpr Kernels kKernels = {
    kTile<float>, kRows, true, read_scratch<Bf16>, read_range<Bf16>, Backward<Bf16, G>::scratch, Backward<Bf16, G>::range,
};

const Kernels& kernels(Dtype, Dtype grad_stream) {
  return grad_stream == Dtype::f32 ? kKernels<float> : kKernels<Bf16>;
}

}  // namespace FC_ISA
}  // namespace fastcircuit
