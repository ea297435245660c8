// Which of the compiled instruction sets this machine can run.
#pragma once

#include <initializer_list>

#include "types.h"

#if defined(FC_AVX512_BF16) || defined(FC_AMX)
#include <cpuid.h>
#endif
#ifdef FC_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastcircuit {

#if defined(FC_AVX512_BF16) || defined(FC_AMX)
// The processor multiplies vectors of bfloat16; asked once.
inline bool has_bf16_products() {
  static const bool has = [] {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 5);
  }();
  return has;
}
#endif

#ifdef FC_AMX
// The processor has bfloat16 vectors and matrix tiles, and the kernel lets this process use them; asked once.
inline bool can_run_amx() {
  static const bool can = [] {
    constexpr unsigned kTiles = 1u << 24 | 1u << 22;
    constexpr long kAskForState = 0x1023, kTileData = 18;
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTiles) != kTiles) return false;
    return has_bf16_products() && syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
  }();
  return can;
}
#endif

inline bool can_run(Isa isa) {
#ifdef FC_AMX
  if (isa == Isa::amx) return can_run(Isa::avx512) && can_run_amx();
#endif
#ifdef FC_AVX512_BF16
  if (isa == Isa::avx512_bf16) return can_run(Isa::avx512) && has_bf16_products();
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
