// The chains on as many threads as are asked for.
#include "peak.h"

namespace fastcircuit {
namespace {

double on_one_thread(Isa isa, Dtype dtype, int64_t rounds) {
#ifdef FC_AVX512_BF16
  if (isa >= Isa::avx512_bf16 && dtype == Dtype::bf16) return avx512_bf16::multiply_adds(dtype, rounds);
#endif
#ifdef FC_X86_VARIANTS
  if (isa >= Isa::avx512) return avx512::multiply_adds(dtype, rounds);
  if (isa == Isa::avx2) return avx2::multiply_adds(dtype, rounds);
#endif
  (void)isa;
  return portable::multiply_adds(dtype, rounds);
}

}  // namespace

double multiply_adds(Isa isa, int threads, Dtype dtype, int64_t rounds) {
  double operations = 0.0;
#pragma omp parallel num_threads(threads) reduction(+ : operations)
  operations += on_one_thread(isa, dtype, rounds);
  (void)threads;
  return operations;
}

}  // namespace fastcircuit
