// Which of the compiled instruction sets this machine can run.
#pragma once

#include <initializer_list>

#include "types.h"

namespace fastcircuit {

inline bool can_run(Isa isa) {
#ifdef FC_X86_VARIANTS
  if (isa == Isa::avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
  if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return isa == Isa::portable;
}

inline Isa best_isa() {
  for (Isa isa : {Isa::avx512, Isa::avx2})
    if (can_run(isa)) return isa;
  return Isa::portable;
}

}  // namespace fastcircuit
