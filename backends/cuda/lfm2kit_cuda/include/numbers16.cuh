// Numbers to multiply where only time counts: zeros would take less power than a model's numbers,
// and chips lower their clock by power.
#pragma once
#include "types.cuh"

// Returns two numbers of 16 bits near 1 in F16, near 1 / 128 in BF16, with random signs and mantissas.
__device__ inline u32 two_numbers(u32 seed) {
  u32 bits = seed * 2654435761u;
  bits = (bits ^ bits >> 15) * 2246822519u;
  return 0x3c003c00u | ((bits ^ bits >> 13) & 0x807f807fu);
}
