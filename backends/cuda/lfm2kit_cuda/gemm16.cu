// out = A @ W.T on tensor cores (mma.sync): operands in 16 bits, sums in float32, in steps of 16
// over k, from 0 on, whatever the tile: equal bits in every batch.  HALF is BF16 or F16.
//
//   a       rows of activations in slabs (slabs.cuh) of `extent` rows
//   w_gnk   matrices packed by `narrow` in packing.cu, [groups][width][k], width a multiple of 128,
//           k of 8
//   tiles   (group, first row, rows, 0); without a list, rows in steps of tile_rows, group 0
//
// A CTA makes 128 columns of up to 128 rows.  Shared memory is swizzled (tile16.cuh) so that
// ldmatrix finds eight rows in different banks.  In the gated kernel W has 8 rows of w1, then 8 of
// w3, and so on: a thread's sums of both belong together.
#include "async_copy.cuh"
#include "layers.cuh"
#include "mma.cuh"
#include "tile16.cuh"

constexpr int kTileN = TILE_COLUMNS, kWarps = kThreads / 32, kCtas = 2;

// kM times 16 rows per warp, kWarpsM x (8 / kWarpsM) warps.
template <int kM, int kWarpsM>
struct Product {
  static constexpr int kTileM = kM * 16 * kWarpsM;
  static constexpr int kN = kTileN / (kWarps / kWarpsM) / 8;  // times 8 columns per warp
  static constexpr int kStage = (kTileM + kTileN) * kTileK * 2;
  static constexpr int kStages = SHARED_BYTES / kStage < 6 ? SHARED_BYTES / kStage : 6;
  static constexpr int kCopiesA = (kTileM + kCopyRows - 1) / kCopyRows;
  static constexpr int kCopiesW = kTileN / kCopyRows;

  const HALF* a_of[kCopiesA];
  const HALF* w_at;
  char* shared;
  int k, slab, chunk, copy_row, row, column;

  __device__ Product(const HALF* a, int extent, const HALF* w_nk, Tile tile, int k, char* shared)
      : shared(shared), k(k), slab(extent * kSlabK) {
    chunk = threadIdx.x % kChunks;
    copy_row = threadIdx.x / kChunks;
#pragma unroll
    for (int i = 0; i < kCopiesA; ++i) {
      int from = tile.row + min(copy_row + i * kCopyRows, tile.rows - 1);  // the last again
      a_of[i] = a + in_slabs(from, chunk * kChunk, extent);
    }
    w_at = w_nk + size_t(tile.column + copy_row) * k + chunk * kChunk;
    int warp = threadIdx.x / 32;
    row = warp % kWarpsM * kM * 16;
    column = warp / kWarpsM * kN * 8;
  }

  __device__ __forceinline__ void load(int stage, int k0) const {
    int wanted = k0 + chunk * kChunk < k ? 16 : 0;
    char* a = shared + stage * kStage;
#pragma unroll
    for (int i = 0; i < kCopiesA; ++i) {
      int to = copy_row + i * kCopyRows;
      if (kTileM % kCopyRows && to >= kTileM) continue;
      copy_async<16>(a + swizzled(to, chunk), a_of[i] + size_t(k0 / kTileK) * slab, 16);
    }
    char* w = a + kTileM * kTileK * 2;
#pragma unroll
    for (int i = 0; i < kCopiesW; ++i)
      copy_async<16>(w + swizzled(copy_row + i * kCopyRows, chunk),
                     w_at + size_t(i * kCopyRows) * k + k0, wanted);
  }

  __device__ __forceinline__ void multiply_stage(int stage, float (&acc)[kM][kN][4]) const {
    u32 a = shared_address(shared + stage * kStage), w = a + kTileM * kTileK * 2;
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 0; step < kTileK / 16; ++step) {
      u32 rows[kM][4], columns[kN / 2][4];
#pragma unroll
      for (int m = 0; m < kM; ++m)
        read_matrices(rows[m], a + swizzled(row + m * 16 + lane % 16, step * 2 + lane / 16));
#pragma unroll
      for (int n = 0; n < kN / 2; ++n)
        read_matrices(columns[n], w + swizzled(column + n * 16 + lane % 8 + lane / 16 * 8,
                                               step * 2 + lane / 8 % 2));
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int n = 0; n < kN; ++n)
          multiply(acc[m][n], rows[m], columns[n / 2][n % 2 * 2], columns[n / 2][n % 2 * 2 + 1]);
    }
  }

  __device__ __forceinline__ void run(float (&acc)[kM][kN][4]) const {
    int steps = (k + kTileK - 1) / kTileK, stage = 0;
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) {
      if (s < steps) load(s, s * kTileK);
      commit_copies();
    }
    for (int s = 0; s < steps; ++s) {
      wait_copies<kStages - 2>();
      __syncthreads();
      int next = s + kStages - 1;
      if (next < steps) load(stage == 0 ? kStages - 1 : stage - 1, next * kTileK);
      commit_copies();
      multiply_stage(stage, acc);
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
  }
};

// Computes one tile; `store` is given a row and column, and the sums of two columns there
// and of two that are 8 columns to the right.
template <int kM, int kWarpsM, class Store>
__device__ __forceinline__ void compute_tile(const HALF* a, int extent, const HALF* w_gnk,
                                             Tile tile, int k, int width, Store store) {
  extern __shared__ __align__(128) char shared[];
  using Mine = Product<kM, kWarpsM>;
  const HALF* w_nk = w_gnk + size_t(tile.group) * width * k;
  Mine product(a, extent, w_nk, tile, k, shared);
  float acc[kM][Mine::kN][4] = {};
  product.run(acc);
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < Mine::kN; n += 2)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int row = product.row + m * 16 + half * 8 + lane / 4;
        if (row < tile.rows)
          store(tile.row + row, tile.column + product.column + n * 8 + lane % 4 * 2,
                acc[m][n] + half * 2, acc[m][n + 1] + half * 2);
      }
}

template <class Store>
__device__ __forceinline__ void compute(const HALF* a, int extent, const HALF* w_gnk,
                                        const int4* tiles, const int* tile_count, int tile_rows,
                                        int m, int k, int width, Store store) {
  int number = number_in_layers(blockIdx.z), row = number * tile_rows;
  Tile tile{0, row, min(tile_rows, m - row), int(blockIdx.x) * kTileN};
  if (tiles) {
    if (number >= *tile_count) return;
    int4 listed = tiles[number];
    tile.group = listed.x, tile.row = listed.y, tile.rows = listed.z;
  }
  if (tile.rows <= 0) return;
  if (tile.rows > 96) compute_tile<4, 2>(a, extent, w_gnk, tile, k, width, store);
  else if (tile.rows > 64) compute_tile<3, 2>(a, extent, w_gnk, tile, k, width, store);
  else if (tile.rows > 48) compute_tile<2, 2>(a, extent, w_gnk, tile, k, width, store);
  else if (tile.rows > 32) compute_tile<3, 1>(a, extent, w_gnk, tile, k, width, store);
  else if (tile.rows > 16) compute_tile<1, 2>(a, extent, w_gnk, tile, k, width, store);
  else compute_tile<1, 1>(a, extent, w_gnk, tile, k, width, store);
}

#include "kernels16.cuh"
