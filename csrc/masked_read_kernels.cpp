// Compiled once per instruction set, with FC_ISA its name and FC_VECTOR_BYTES the size of its registers.
#include "masked_read_backward.h"
#include "masked_read_forward.h"

namespace fastcircuit {
namespace FC_ISA {

template <class S, class G>
constexpr Kernels kKernels = {
    kTile<typename Traits<S>::Accumulate>, kRows, false, read_scratch<S>, read_range<S>,
    Backward<S, G>::scratch, Backward<S, G>::range,
};

const Kernels& kernels(Dtype stream, Dtype grad_stream) {
  if (stream == Dtype::f64) return kKernels<double, double>;
  if (stream == Dtype::f32) return kKernels<float, float>;
  return grad_stream == Dtype::f32 ? kKernels<Bf16, float> : kKernels<Bf16, Bf16>;
}

}  // namespace FC_ISA
}  // namespace fastcircuit
