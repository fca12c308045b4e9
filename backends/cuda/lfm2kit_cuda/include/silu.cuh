// x / (1 + e^-x) in float32.  cpu_simd's elementwise.py does the same operations in their order, so
// both have the same bits.
#pragma once
#include "approximate.cuh"

// 1 / x as `/` rounds it, for x from 1 to 2^126: the instructions of __frcp_rn, without its test for
// other numbers, which need a call.
__device__ __forceinline__ float reciprocal(float x) {
  float inverse = approximate_reciprocal(x);
  return fmaf(inverse, fmaf(-x, inverse, 1.0f), inverse);
}

// Below -87.3 it is 1.2e-38 of x, which is less than matters: up to there 1 / (1 + e^-x) is normal.
__device__ __forceinline__ float silu(float x) {
  constexpr float kMost = 87.3f, kLog2E = 1.442695f;
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  // A float plus this is rounded to a whole number n, and its last eight bits are n + 127.
  constexpr float kShift = 1.5f * 8388608 + 127;
  float minus_x = fminf(fmaxf(-x, -kMost), kMost);
  float shifted = fmaf(minus_x, kLog2E, kShift), n = shifted - kShift;
  float r = fmaf(-n, kLn2Low, fmaf(-n, kLn2High, minus_x));
  float e_r = fmaf(0.001381454f, r, 0.008368745f);
  e_r = fmaf(e_r, r, 0.04166839f);
  e_r = fmaf(e_r, r, 0.16666521f);
  e_r = fmaf(e_r, r, 0.49999994f);
  e_r = fmaf(e_r, r, 1.0f);
  e_r = fmaf(e_r, r, 1.0f);
  float two_n = __uint_as_float(__float_as_uint(shifted) << 23);
  return x * reciprocal(fmaf(e_r, two_n, 1.0f));
}
