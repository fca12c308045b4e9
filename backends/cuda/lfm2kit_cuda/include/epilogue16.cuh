// What gemm16.cu does with its sums; a thread has those of two neighbouring columns.
#pragma once
#include "neighbours.cuh"
#include "types.cuh"

// Stores the sums of two columns, plus bias_n (null for none), in a row of n columns.
template <class Stored>
__device__ __forceinline__ void store_sums(Stored* row, int column, int n, const float* bias_n,
                                           const float* sums) {
  float both[2] = {sums[0], sums[1]};
#pragma unroll
  for (int i = 0; i < 2; ++i)
    if (bias_n && column + i < n) both[i] += bias_n[column + i];
  store_neighbours(row + column, Neighbours<Stored, 2>(both), n - column, n % 2 == 0);
}

// Stores silu(gate) * up * GATED_SCALE of two columns.
__device__ __forceinline__ void store_gated(HALF* out, const float* gate, const float* up) {
  HALF products[2];
#pragma unroll
  for (int i = 0; i < 2; ++i)
    products[i] = HALF::from_float(gate[i] / (1 + expf(-gate[i])) * up[i] * GATED_SCALE);
  *reinterpret_cast<u32*>(out) = u32(products[0].bits) | u32(products[1].bits) << 16;
}
