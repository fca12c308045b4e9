// Measures what Hopper's tensor cores do at best with the instruction of a warpgroup (wgmma).
#include "barrier.cuh"
#include "numbers16.cuh"
#include "wgmma.cuh"

constexpr int kGroup = 128, kGroups = 2;             // threads of a warpgroup, warpgroups of a CTA
constexpr int kRows = 64, kColumns = 192, kStep = 4;  // instructions in a row of 128 bytes
constexpr int kRowBytes = 128;

// Every warpgroup multiplies the same operands in shared memory again and again: 4 * steps products
// of 64 x 192 x 16.
extern "C" __global__ void __launch_bounds__(kGroup* kGroups)
    multiply_add_wgmma(float* out, int steps) {
  constexpr int kWords = (kGroups * kRows + kColumns) * kRowBytes / 4;
  __shared__ __align__(1024) u32 operands[kWords];
  for (int i = threadIdx.x; i < kWords; i += kGroup * kGroups) operands[i] = two_numbers(i);
  fence_stores();
  __syncthreads();
  u32 begin = shared_address(operands);
  u64 a = matrix_descriptor(begin + threadIdx.x / kGroup * kRows * kRowBytes);
  u64 b = matrix_descriptor(begin + kGroups * kRows * kRowBytes);
  float sums[kColumns / 2] = {};
  for (int step = 0; step < steps; ++step) {
    wgmma_begin();
#pragma unroll
    for (int k = 0; k < kStep; ++k) Wgmma<kColumns>::multiply(sums, a + 2 * k, b + 2 * k, true);
    wgmma_commit();
    wgmma_wait<1>();
  }
  wgmma_wait<0>();
  wgmma_end<kColumns / 2>(sums);
  float total = 0;
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) total += sums[i];
  if (total == 0.123f) *out = total;  // never, but the compiler cannot know
}
