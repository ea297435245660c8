// How fast the processor multiplies and adds: chains that stay in registers, with nothing to load or to wait for.
#pragma once

#include <cstdint>

#include "types.h"

namespace fastcircuit {

// Runs `rounds` steps of every chain on every thread; returns how many floating-point operations that were.
double multiply_adds(Isa isa, int threads, Dtype dtype, int64_t rounds);

// The same on one thread.
namespace portable {
double multiply_adds(Dtype dtype, int64_t rounds);
}
namespace avx2 {
double multiply_adds(Dtype dtype, int64_t rounds);
}
namespace avx512 {
double multiply_adds(Dtype dtype, int64_t rounds);
}
namespace avx512_bf16 {
double multiply_adds(Dtype dtype, int64_t rounds);  // of bfloat16 alone
}

}  // namespace fastcircuit
