// What every operation needs to split its work over threads: which thread this is, and memory of its own for each.
#pragma once

#include <algorithm>
#include <cstdint>
#include <new>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace fastcircuit {

// The width of a cache line and of the widest register.
constexpr int64_t kAlign = 64;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

inline int this_thread() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Aligned memory, not initialised, for as long as it is in scope.
struct Buffer {
  explicit Buffer(int64_t bytes) : data(::operator new(size_t(std::max<int64_t>(bytes, 1)), std::align_val_t(kAlign))) {}
  ~Buffer() { ::operator delete(data, std::align_val_t(kAlign)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  void* data;
};

}  // namespace fastcircuit
