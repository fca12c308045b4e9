// Reads of shared memory by its own addresses, and barriers of part of a CTA.  They stand alone
// so that tests can run what is built on them without a GPU (tests/cuda/emulated).
#pragma once
#include "types.cuh"

__device__ __forceinline__ void read_four(float* to, u32 address) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3])
               : "r"(address));
}

__device__ __forceinline__ void read_two(float* to, u32 address) {
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(to[0]), "=f"(to[1]) : "r"(address));
}

// The threads of a group, of kThreads each, wait for each other.
template <int kThreads>
__device__ __forceinline__ void synchronize_group(int group) {  // 0 is the barrier of __syncthreads
  asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "n"(kThreads) : "memory");
}
