// Copies from global to shared memory that run beside the arithmetic (cp.async, from sm_80 on).
// On older chips they are plain loads and stores, complete at once; the callers' barriers do.
#pragma once
#include "types.cuh"

__device__ inline u32 shared_address(const void* pointer) {
  return u32(__cvta_generic_to_shared(pointer));
}

// Starts the copy of kBytes (4 or 16) to `to`; the first `wanted` come from `from`, the rest are zero.
template <int kBytes>
__device__ inline void copy_async(void* to, const void* from, int wanted) {
  static_assert(kBytes == 4 || kBytes == 16, "a word or a vector of four");
#if __CUDA_ARCH__ >= 800
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(wanted));
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(wanted));
#else
  u32 words[kBytes / 4] = {};
  if (wanted == kBytes) {
    if constexpr (kBytes == 16) *reinterpret_cast<uint4*>(words) = *static_cast<const uint4*>(from);
    else words[0] = *static_cast<const u32*>(from);
  } else {
    for (int i = 0; 4 * i < wanted; ++i) words[i] = static_cast<const u32*>(from)[i];
  }
  for (int i = 0; i < kBytes / 4; ++i) static_cast<u32*>(to)[i] = words[i];
#endif
}

__device__ inline void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;");
#endif
}

// Waits until at most kPending of this thread's latest groups are under way.
template <int kPending>
__device__ inline void wait_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending));
#endif
}
