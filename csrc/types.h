// The number types and instruction sets every kernel is compiled for.
#pragma once

#include <cstdint>

#define FC_INLINE inline __attribute__((always_inline))

namespace fastcircuit {

struct Bf16 {
  uint16_t bits;
};

enum class Dtype : int { f32 = 0, f64 = 1, bf16 = 2 };
enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx = 4 };

}  // namespace fastcircuit
