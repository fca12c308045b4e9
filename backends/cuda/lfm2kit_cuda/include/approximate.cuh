// Approximations by single instructions.  They stand alone so that tests can run what is built on
// them without a GPU (tests/cuda/emulated).
#pragma once

// 1 / x within a unit of the last place, for a normal x with a normal 1 / x.
__device__ __forceinline__ float approximate_reciprocal(float x) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  return inverse;
}

// 2^x within some 2^-22 of it.
__device__ __forceinline__ float approximate_power_of_2(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}
