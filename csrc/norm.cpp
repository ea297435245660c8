// What is the same for every instruction set: choosing the kernel, and splitting the rows over threads.
#include "norm.h"

#include <algorithm>

#include "isa.h"

namespace fastcircuit {
namespace {

// Below this many numbers a thread costs more to wake than it saves.
constexpr int64_t kNumbersPerThread = 1 << 15;

const NormKernels& kernels_for(Isa isa, Dtype dtype, bool centered) {
#ifdef FC_X86_VARIANTS
  if (isa >= Isa::avx512) return avx512::norm_kernels(dtype, centered);
  if (isa == Isa::avx2) return avx2::norm_kernels(dtype, centered);
#endif
  (void)isa;
  return portable::norm_kernels(dtype, centered);
}

// No row depends on another, so the result is the same for any number of threads.
void for_row_ranges(const NormParams& p, NormRange run) {
  if (p.rows == 0 || p.width == 0) return;
  const int64_t useful = std::min(p.rows, p.rows * p.width / kNumbersPerThread);
  const int64_t threads = std::max<int64_t>(1, std::min<int64_t>(p.threads, useful));
  if (threads == 1) return run(p, 0, p.rows);
#pragma omp parallel for num_threads(int(threads)) schedule(static, 1)
  for (int64_t thread = 0; thread < threads; ++thread)
    run(p, p.rows * thread / threads, p.rows * (thread + 1) / threads);
}

}  // namespace

void norm(const NormParams& p) { for_row_ranges(p, kernels_for(p.isa, p.dtype, p.centered).forward); }

void norm_backward(const NormParams& p) { for_row_ranges(p, kernels_for(p.isa, p.dtype, p.centered).backward); }

}  // namespace fastcircuit
