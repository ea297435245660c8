// What is the same for every instruction set: choosing the kernel, and splitting columns and tokens over threads.
#include "mlp.h"

#include <algorithm>

#include "isa.h"
#include "threads.h"

namespace fastcircuit {
namespace {

// Below this many multiply-adds a thread costs more to wake than it saves.
constexpr int64_t kWorkPerThread = 1 << 17;
// So many panels for each thread are shared out evenly enough; where there are fewer, tokens are split too, and each
// part copies the weights again, which is worth it for this many tokens or more.
constexpr int64_t kPanelsPerThread = 8, kLeastTokens = 48;

const MlpKernels& kernels_for(Isa isa, Dtype dtype) {
#ifdef FC_X86_VARIANTS
  if (isa >= Isa::avx512) return avx512::mlp_kernels(dtype);
  if (isa == Isa::avx2) return avx2::mlp_kernels(dtype);
#endif
  (void)isa;
  return portable::mlp_kernels(dtype);
}

// The panels of `columns` columns, for some tokens at a time.
struct Tasks {
  int64_t panels, parts, tokens, ahead;

  Tasks(int64_t columns, int64_t tile, int64_t tokens, int64_t threads)
      : panels((columns + tile - 1) / tile), parts(1), tokens(tokens), ahead(threads) {
    if (panels % threads != 0 && panels < kPanelsPerThread * threads)
      parts = std::max<int64_t>(1, std::min(threads, tokens / kLeastTokens));
  }

  int64_t count() const { return panels * parts; }

  MlpTask operator[](int64_t i) const {
    const int64_t part = i % parts, next = std::min((i + ahead) / parts, panels - 1);
    return {tokens * part / parts, tokens * (part + 1) / parts, i / parts, next, nullptr, nullptr};
  }
};

// Every number is summed in one order, whoever does it, so the result is the same for any number of threads.
void run(const MlpParams& p, const MlpKernels& k, int64_t planes, void (*inner)(const MlpParams&, const MlpTask&),
         void (*outer)(const MlpParams&, const MlpTask&)) {
  if (p.tokens == 0 || p.width == 0) return;
  const int64_t useful = p.tokens * p.width * p.hidden * (p.gated ? 3 : 2) / kWorkPerThread;
  const int threads = int(std::max<int64_t>(1, std::min<int64_t>(p.threads, useful)));
  const int64_t size = round_up(k.scratch, kAlign);
  const Buffer scratch(size * threads), hidden(planes * p.tokens * p.hidden * k.number);
  const Tasks first(p.hidden, k.tile, p.tokens, threads), second(p.width, k.tile, p.tokens, threads);
  const auto task = [&](MlpTask one) {
    one.inner = hidden.data, one.scratch = static_cast<char*>(scratch.data) + this_thread() * size;
    return one;
  };
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < first.count(); ++i) inner(p, task(first[i]));
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < second.count(); ++i) outer(p, task(second[i]));
  }
}

}  // namespace

void mlp(const MlpParams& p) {
  const MlpKernels& k = kernels_for(p.isa, p.dtype);
  run(p, k, 1, k.forward_inner, k.forward_outer);
}

void mlp_backward(const MlpParams& p) {
  const MlpKernels& k = kernels_for(p.isa, p.dtype);
  run(p, k, p.gated ? 2 : 1, k.backward_inner, k.backward_outer);
}

}  // namespace fastcircuit
