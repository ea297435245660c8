// What is the same for every instruction set: choosing the kernel, and splitting sequences and heads over threads.
#include "packed_attention.h"

#include <algorithm>

#include "isa.h"
#include "threads.h"

namespace fastcircuit {
namespace {

// Below this many multiply-adds a thread costs more to wake than it saves.
constexpr int64_t kWorkPerThread = 1 << 17;

const AttentionKernels& kernels_for(Isa isa, Dtype dtype) {
#ifdef FC_X86_VARIANTS
  if (isa >= Isa::avx512) return avx512::attention_kernels(dtype);
  if (isa == Isa::avx2) return avx2::attention_kernels(dtype);
#endif
  (void)isa;
  return portable::attention_kernels(dtype);
}

// Every task writes its own rows, so the result is the same for any number of threads.
void for_tasks(const AttentionParams& p, int64_t scratch_bytes, AttentionTask run) {
  const int64_t tasks = p.sequences * p.kv_heads;
  if (tasks == 0 || p.heads == 0 || p.width == 0) return;
  const int64_t work = p.heads * p.tokens * p.longest * p.width;
  const int threads = int(std::max<int64_t>(1, std::min<int64_t>({p.threads, work / kWorkPerThread, tasks})));
  const int64_t size = round_up(scratch_bytes, kAlign);
  const Buffer scratch(size * threads);
  char* const base = static_cast<char*>(scratch.data);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
  for (int64_t task = 0; task < tasks; ++task)
    run(p, task / p.kv_heads, task % p.kv_heads, base + this_thread() * size);
}

}  // namespace

void packed_attention(const AttentionParams& p) {
  const AttentionKernels& k = kernels_for(p.isa, p.dtype);
  for_tasks(p, k.forward_scratch(p), k.forward);
}

void packed_attention_backward(const AttentionParams& p) {
  const AttentionKernels& k = kernels_for(p.isa, p.dtype);
  for_tasks(p, k.backward_scratch(p), k.backward);
}

}  // namespace fastcircuit
