// Stores into the memory of other GPUs of this machine, which this GPU has mapped, and the flags that
// announce them.  Other GPUs are another scope than this one's threads: all orders are the system's.
#pragma once
#include "ordering.cuh"

template <class T>
__device__ inline void store_to_peer(T* at, T value) {
  *at = value;
}

// Counts a CTA that has stored its share into peers' memory, and returns how many have before.  To the
// last one all shares are stored, and so they are for a peer that sees a flag which it raises.
__device__ inline u32 arrive_for_peers(u32* count) {
  u32 before;
  asm volatile("atom.add.acq_rel.sys.global.u32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(count)
               : "memory");
  return before;
}

// Raises a flag in a peer's memory after everything that this thread has stored, or seen to be stored.
__device__ inline void raise_flag(u32* at, u32 value) { store_release(at, value); }
