// The chains of the instruction set that multiplies bfloat16 in pairs: two multiply-adds per lane.
#include <immintrin.h>

#include "peak_chains.h"

namespace fastcircuit {
namespace FC_ISA {

double multiply_adds(Dtype, int64_t rounds) {
  const __m512bh a = (__m512bh)_mm512_set1_epi32(0x3f003f00), b = (__m512bh)_mm512_set1_epi32(0x3e803e80);
  const auto step = [&](Vec<float>& sum) { sum = (Vec<float>)_mm512_dpbf16_ps((__m512)sum, a, b); };
  return 4.0 * double(run_chains<float>(rounds, step));
}

}  // namespace FC_ISA
}  // namespace fastcircuit
