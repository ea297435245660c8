// masked_read on matrix tiles, for a bfloat16 stream and enough readers to fill them.
#include "masked_read_amx_backward.h"
#include "masked_read_amx_forward.h"

namespace fastcircuit {
namespace FC_ISA {

template <class G>
constexpr Kernels kKernels = {
    kInner, 1, false, Read::scratch, Read::range, Backward<G>::scratch, Backward<G>::range,
};

const Kernels& kernels(Dtype, Dtype grad_stream) {
  return grad_stream == Dtype::f32 ? kKernels<float> : kKernels<Bf16>;
}

}  // namespace FC_ISA
}  // namespace fastcircuit
