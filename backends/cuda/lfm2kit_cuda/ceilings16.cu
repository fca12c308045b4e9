// Measures what tensor cores do at best with the instruction of a warp (mma.sync).
#include "mma.cuh"
#include "numbers16.cuh"

// Every warp adds to CHAINS independent tiles of sums: CHAINS * steps products of 16 x 8 x 16.
extern "C" __global__ void multiply_add_mma(float* out, int steps) {
  float sums[CHAINS][4] = {};
  u32 a[4], b[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = two_numbers(6 * threadIdx.x + i);
#pragma unroll
  for (int i = 0; i < 2; ++i) b[i] = two_numbers(6 * threadIdx.x + 4 + i);
  for (int step = 0; step < steps; ++step)
#pragma unroll
    for (int i = 0; i < CHAINS; ++i) multiply(sums[i], a, b[0], b[1]);
  float total = 0;
#pragma unroll
  for (int i = 0; i < CHAINS; ++i) total += sums[i][0] + sums[i][1] + sums[i][2] + sums[i][3];
  if (total == 0.123f) *out = total;  // never, but the compiler cannot know
}
