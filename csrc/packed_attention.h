// Causal (or not), optionally windowed softmax attention of packed sequences, rotary positions included, and its
// gradients: for prompts of tens of tokens, where padding, layout changes and one call per step cost more than the
// arithmetic. Scores live for as many queries as a register has lanes; backward computes them again.
#pragma once

#include <cstdint>

#include "types.h"

namespace fastcircuit {

struct AttentionParams {
  Dtype dtype;
  int64_t heads, kv_heads, tokens, width;  // width: of one head
  int64_t sequences, longest;
  const int64_t* starts;      // [sequences + 1]: first token of each sequence, and the number of tokens
  const int64_t* kv_of_head;  // [heads]
  const void *query, *key, *value;  // [heads or kv_heads, tokens, width], contiguous
  const void *cos, *sin;            // [tokens, rotary], contiguous; rotary 0: no rotary positions
  int64_t rotary;
  double scale;
  bool causal;
  int64_t window;  // tokens seen back, the token itself included; 0: all
  void* out;       // [tokens, heads * width], forward
  const void* grad_out;                      // like out, backward
  void *grad_query, *grad_key, *grad_value;  // like query, key, value, backward
  int threads;
  Isa isa;
};

void packed_attention(const AttentionParams& params);
void packed_attention_backward(const AttentionParams& params);

// One sequence and key/value head, with the heads that read it. `scratch`: *_scratch bytes, 64-byte aligned.
using AttentionTask = void (*)(const AttentionParams&, int64_t sequence, int64_t kv_head, void* scratch);

// The kernels of one instruction set for one dtype.
struct AttentionKernels {
  int64_t (*forward_scratch)(const AttentionParams&);
  AttentionTask forward;
  int64_t (*backward_scratch)(const AttentionParams&);
  AttentionTask backward;
};

namespace portable {
const AttentionKernels& attention_kernels(Dtype dtype);
}
namespace avx2 {
const AttentionKernels& attention_kernels(Dtype dtype);
}
namespace avx512 {
const AttentionKernels& attention_kernels(Dtype dtype);
}

}  // namespace fastcircuit
