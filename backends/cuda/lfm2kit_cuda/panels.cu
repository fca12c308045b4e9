// Gathers rows of activations into panels (panels.cuh).  The last row is repeated up to the tile's
// height, and there are zeros beyond the columns.
#include "even_tiles.cuh"
#include "layers.cuh"
#include "panels.cuh"
#include "types.cuh"

constexpr int kThreads = ARRANGE_THREADS, kPart = PART;  // of k, per CTA
constexpr int kFours = 16;  // fours of rows side by side: more than a tile has

// A CTA per kPart of k and tile; tiles as in gemm.cu.
extern "C" __global__ void __launch_bounds__(kThreads)
    arrange(const float* x_mc, const int* source_m, float* panels_tkr, const int4* tiles,
            const int* tile_count, int m, int dense_tiles, int columns, int k) {
  __shared__ float part[kTallest][kPart + 1];
  int tile = number_in_layers(blockIdx.z), first, rows;
  if (tile >= (tiles ? *tile_count : dense_tiles)) return;
  if (tiles) {
    first = tiles[tile].y, rows = tiles[tile].z;
  } else {
    EvenTiles even = even_tiles(m, dense_tiles, kHeightStep);
    first = even.first_row(tile), rows = even.rows_of(tile);
  }
  int k0 = blockIdx.x * kPart, x = threadIdx.x % kPart, height = height_of(rows);
  for (int y = threadIdx.x / kPart; y < height; y += kThreads / kPart) {
    int from = first + min(y, rows - 1), row = source_m ? source_m[from] : from;
    part[y][x] = k0 + x < columns ? x_mc[size_t(row) * columns + k0 + x] : 0;
  }
  __syncthreads();
  int row = threadIdx.x % kFours * 4;
  if (row >= height) return;
  float* panel_kr = panels_tkr + size_t(tile) * k * kTallest + size_t(k0) * height + row;
  for (int i = threadIdx.x / kFours; i < min(kPart, k - k0); i += kThreads / kFours)
    *reinterpret_cast<float4*>(panel_kr + i * height) =
        make_float4(part[row][i], part[row + 1][i], part[row + 2][i], part[row + 3][i]);
}
