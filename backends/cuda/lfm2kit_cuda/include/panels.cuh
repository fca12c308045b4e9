// Activations in float32 as gemm.cu reads them: a panel for each tile of rows, [k, height of
// the tile].  Each begins where it would if all tiles were the tallest.
#pragma once

constexpr int kTallest = TALLEST, kLowest = LOWEST, kHeightStep = HEIGHT_STEP;  // in rows

// The height of a tile with `rows` rows.
__device__ __forceinline__ int height_of(int rows) {
  return max(kLowest, (rows + kHeightStep - 1) / kHeightStep * kHeightStep);
}
