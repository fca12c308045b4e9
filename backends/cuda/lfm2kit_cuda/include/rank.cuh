// Floats by their order.
#pragma once
#include "types.cuh"

// Returns a number that is larger for a larger float, and never 0; 0 and -0 have the same.
__device__ inline u32 rank_of(float x) {
  u32 bits = __float_as_uint(__fadd_rn(x, 0.0f));  // no -0
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
