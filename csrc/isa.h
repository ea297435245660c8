// Which of the compiled instruction sets this machine can run.
#pragma once

#include <initializer_list>

#include "types.h"

#ifdef FC_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastcircuit {

#ifdef FC_AMX
// The processor has bfloat16 vectors and matrix tiles, and the kernel lets this process use them; asked once.
inline bool can_run_amx() {
  static const bool can = [] {
    constexpr unsigned kVectors = 1u << 5, kTiles = 1u << 24 | 1u << 22;
    constexpr long kAskForState = 0x1023, kTileData = 18;
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTiles) != kTiles) return false;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || (a & kVectors) != kVectors) return false;
    return syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
  }();
  return can;
}
#endif

inline bool can_run(Isa isa) {
#ifdef FC_AMX
  if (isa == Isa::amx) return can_run(Isa::avx512) && can_run_amx();
#endif
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

inline bool is_intel() {
#ifdef FC_X86_VARIANTS
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

}  // namespace fastcircuit
