// Activations in float32 as gemm.cu reads them: a panel for each tile of rows, in which k is outside,
// and inside are as many rows as the tile is high.  Each begins where it would if all were the
// tallest.
#pragma once

constexpr int kTallest = TALLEST, kLowest = LOWEST, kHeightStep = HEIGHT_STEP;  // in rows

// Of a tile with so many rows.
__device__ __forceinline__ int height_of(int rows) {
  return max(kLowest, (rows + kHeightStep - 1) / kHeightStep * kHeightStep);
}
