// Rows of activations into panels, as gemm.cu reads them: one for each tile of rows, with k outside
// and the rows inside, gathered, the last repeated up to the tile's height, zeros beyond the columns.
#include "types.cuh"

constexpr int kHeight = 4 * ROWS;          // of a panel
constexpr int kThreads = 256, kPart = 64;  // of k, per block

// A block per kPart of k and tile; tiles as in gemm.cu.
extern "C" __global__ void __launch_bounds__(kThreads)
    arrange(const float* x_mc, const int* source_m, float* panels_tkr, const int4* tiles,
            const int* tile_count, int m, int columns, int k) {
  __shared__ float part[kHeight][kPart + 1];
  int first = blockIdx.y * kHeight, rows = min(kHeight, m - first);
  if (tiles) {
    if (blockIdx.y >= *tile_count) return;
    first = tiles[blockIdx.y].y, rows = tiles[blockIdx.y].z;
  }
  int k0 = blockIdx.x * kPart, x = threadIdx.x % kPart;
  for (int y = threadIdx.x / kPart; y < kHeight; y += kThreads / kPart) {
    int from = first + min(y, rows - 1), row = source_m ? source_m[from] : from;
    part[y][x] = k0 + x < columns ? x_mc[size_t(row) * columns + k0 + x] : 0;
  }
  __syncthreads();
  float* panel_kr = panels_tkr + (size_t(blockIdx.y) * k + k0) * kHeight;
  for (int i = threadIdx.x; i < min(kPart, k - k0) * kHeight; i += kThreads)
    panel_kr[i] = part[i % kHeight][i / kHeight];
}
