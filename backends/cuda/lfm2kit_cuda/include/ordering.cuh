// Accesses to words that other CTAs or threads of the host access at the same time, each ordered as
// its name says, and the device's clock.  The host's memory is mapped.
#pragma once
#include "types.cuh"

// Returns a word that the host stores; what it has written before is then there to be read.
__device__ inline u32 load_acquire(const u32* at) {
  u32 value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}

// Returns a word that others store, and nothing of what they have written before.
__device__ inline u32 load_relaxed(const u32* at) {
  u32 value;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}

// Returns two neighbouring words that the host stores.
__device__ inline u64 load_two_relaxed(const u32* at) {
  u64 both;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(both) : "l"(at));
  return both;
}

// Returns four neighbouring words that the host stores.  `at` is a multiple of 16 bytes.
__device__ inline uint4 load_four_relaxed(const u32* at) {
  uint4 four;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(four.x), "=r"(four.y), "=r"(four.z), "=r"(four.w)
               : "l"(at));
  return four;
}

// Stores a word for the host.
__device__ inline void store_relaxed(u32* at, u32 value) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}

// Stores a word for the host, after everything that this thread has written or seen to be written.
__device__ inline void store_release(u32* at, u32 value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}

// Counts a CTA that has written its share, and returns how many have before.  To the last one all
// shares are written, and so they are for whoever sees what it writes.
__device__ inline u32 arrive(u32* count) {
  u32 before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(count)
               : "memory");
  return before;
}

__device__ inline u64 nanoseconds() {
  u64 now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}
