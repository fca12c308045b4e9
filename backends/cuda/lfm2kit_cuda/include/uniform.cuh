// What is the same in all threads of a warp: the compiler keeps it, and what is computed from it, in
// the warp's registers and not in each thread's.  The loops of the products have none to spare, and
// copies and matrix instructions take their operands from there.
#pragma once
#include "types.cuh"

__device__ __forceinline__ int uniform(int x) { return __shfl_sync(~0u, x, 0); }

template <class T>
__device__ __forceinline__ T* uniform(T* at) {
  u64 address = reinterpret_cast<u64>(at);
  u32 low = uniform(int(address)), high = uniform(int(address >> 32));
  return reinterpret_cast<T*>(u64(high) << 32 | low);
}
