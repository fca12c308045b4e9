// Sums of arrays that blocks return.
#include "dependent.cuh"
#include "vector.cuh"

// sum_rh = left_rh + right_rh, rows r of h columns; a CTA per row.
extern "C" __global__ void add_arrays(const float* left_rh, const float* right_rh, float* sum_rh,
                                      int h) {
  wait_for_previous();
  let_next_start();
  size_t row = size_t(blockIdx.x) * h;
  for (int i = threadIdx.x * VECTOR; i < h; i += blockDim.x * VECTOR) {
    Vector sum = load(left_rh + row + i), right = load(right_rh + row + i);
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) sum.of[v] = __fadd_rn(sum.of[v], right.of[v]);
    store(sum_rh + row + i, sum);
  }
}
