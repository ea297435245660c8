// Compiled once per instruction set, with FC_ISA its name and FC_VECTOR_BYTES the size of its registers.
#include "peak_chains.h"

namespace fastcircuit {
namespace FC_ISA {

// sum = sum a + b: what does not change from step to step, a b, would be computed once.
template <class A>
double chains(int64_t rounds) {
  const Vec<A> a = splat(A(0.5)), b = splat(A(0.25));
  return 2.0 * double(run_chains<A>(rounds, [&](Vec<A>& sum) { sum = sum * a + b; }));
}

double multiply_adds(Dtype dtype, int64_t rounds) {
  return dtype == Dtype::f64 ? chains<double>(rounds) : chains<float>(rounds);
}

}  // namespace FC_ISA
}  // namespace fastcircuit
