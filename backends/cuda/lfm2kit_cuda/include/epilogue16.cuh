// What gemm16.cu does with sums, of which a thread holds two neighbours.
#pragma once
#include "types.cuh"

// Two columns of a row that has n, plus bias_n (null for none).
__device__ __forceinline__ void store_sums(float* row, int column, int n, const float* bias_n,
                                           const float* sums) {
  if (n % 2 == 0 && column < n) {
    float2 both = make_float2(sums[0], sums[1]);
    if (bias_n) both.x += bias_n[column], both.y += bias_n[column + 1];
    *reinterpret_cast<float2*>(row + column) = both;
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (column + i < n) row[column + i] = bias_n ? sums[i] + bias_n[column + i] : sums[i];
  }
}

// silu(gate) * up * GATED_SCALE of two columns.
__device__ __forceinline__ void store_gated(HALF* out, const float* gate, const float* up) {
  HALF products[2];
#pragma unroll
  for (int i = 0; i < 2; ++i)
    products[i] = HALF::from_float(gate[i] / (1 + expf(-gate[i])) * up[i] * GATED_SCALE);
  *reinterpret_cast<u32*>(out) = u32(products[0].bits) | u32(products[1].bits) << 16;
}
