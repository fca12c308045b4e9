// Stores into the memory of other GPUs of this machine, which this GPU has mapped, and the flags that
// announce them.  CTAs that have stored their share tell the last one of them by `arrive`, whose scope is
// this GPU.  Only the flag's scope is the system: what its thread has seen to be stored is stored for
// those who see the flag, whoever has stored it (PTX calls this causality order).
#pragma once
#include "ordering.cuh"

template <class T>
__device__ inline void store_to_peer(T* at, T value) {
  *at = value;
}

// Raises a flag in a peer's memory after everything that this thread has stored, or seen to be stored.
__device__ inline void raise_flag(u32* at, u32 value) { store_release(at, value); }
