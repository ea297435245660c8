// The mask where products are of bfloat16. Always inline: nothing compiled for one instruction set may serve another.
#pragma once

#include <cstring>

#include "types.h"

namespace fastcircuit {

// A float32 as the sum of bfloat16 parts: one is enough for a bfloat16, two are closer than a bfloat16 result can
// tell, three are all of it (below 2^-110 the last ones are lost).
constexpr int kMaxParts = 3;

FC_INLINE int mask_parts(Dtype mask, Dtype result) { return mask == Dtype::bf16 ? 1 : result == Dtype::bf16 ? 2 : 3; }

FC_INLINE void split(float value, Bf16 (&parts)[kMaxParts]) {
  for (Bf16& part : parts) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits = (bits + 0x8000) & 0xffff0000;
    part.bits = uint16_t(bits >> 16);
    float rounded;
    std::memcpy(&rounded, &bits, sizeof rounded);
    value -= rounded;
  }
}

}  // namespace fastcircuit
