// What is the same for every instruction set: choosing the kernel, and splitting heads and tokens over threads.
#include "norm_projection.h"

#include <algorithm>

#include "isa.h"
#include "threads.h"

namespace fastcircuit {
namespace {

// Below this many multiply-adds a thread costs more to wake than it saves.
constexpr int64_t kWorkPerThread = 1 << 16;
// A head's weights are packed once for this many tokens or more.
constexpr int64_t kLeastTokens = 192;
constexpr int64_t kTasksPerThread = 4;

const NormProjectionKernels& kernels_for(const NormProjectionParams& p) {
#ifdef FC_X86_VARIANTS
  if (p.isa >= Isa::avx512) return avx512::norm_projection_kernels(p.dtype, p.centered);
  if (p.isa == Isa::avx2) return avx2::norm_projection_kernels(p.dtype, p.centered);
#endif
  return portable::norm_projection_kernels(p.dtype, p.centered);
}

// Every row is computed in the same way whoever does it, so the result is the same for any number of threads.
void for_tasks(const NormProjectionParams& p, int64_t scratch_size, NormProjectionRange run) {
  if (p.heads == 0 || p.tokens == 0) return;
  const int64_t useful = p.heads * p.tokens * p.width * p.head_width / kWorkPerThread;
  const int threads = int(std::max<int64_t>(1, std::min<int64_t>(p.threads, useful)));
  const int64_t wanted = (threads * kTasksPerThread + p.heads - 1) / p.heads;
  const int64_t parts = std::max<int64_t>(1, std::min(wanted, p.tokens / kLeastTokens));
  const int64_t size = round_up(scratch_size, kAlign);
  const Buffer scratch(size * threads);
  const auto task = [&](int64_t i) {
    const int64_t part = i % parts;
    run(p, i / parts, p.tokens * part / parts, p.tokens * (part + 1) / parts,
        static_cast<char*>(scratch.data) + this_thread() * size);
  };
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t i = 0; i < p.heads * parts; ++i) task(i);
}

}  // namespace

void norm_projection(const NormProjectionParams& p) {
  const NormProjectionKernels& k = kernels_for(p);
  for_tasks(p, k.forward_scratch(p), k.forward);
}

void norm_projection_backward(const NormProjectionParams& p) {
  const NormProjectionKernels& k = kernels_for(p);
  for_tasks(p, k.backward_scratch(p), k.backward);
}

}  // namespace fastcircuit
