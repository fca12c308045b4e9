// out = A @ W in float32, one fused multiply-add per term: every output element is one chain over
// k, from 0 on, whatever the tile.  So its bits depend neither on the batch nor on the tile menu.
//
//   a_mk    rows of activations, taken in place or gathered through source_m
//   w_gkw   matrices packed by `transpose` in packing.cu, [groups][k][width], width a multiple of
//           kTileN, padded with zeros
//   tiles   (group, first row, rows, 0); without a list, rows in steps of tile_rows, group 0
//
// A block makes kTileN columns of one tile of up to 128 rows; it has 16 x 16 threads of
// kRows x 8 outputs each, where kRows = rows / 16 rounded up is chosen per tile: an expert with
// few tokens costs few multiplications.  Activations lie in shared memory as they do in global
// memory (k inside), so that rows can be gathered 16 bytes at a time; a thread reads four k of its
// rows at once.  Weights lie with k outside, and a thread reads 2 x 4 columns, 32 apart: in the
// gated kernel these are four of w1 and their four of w3.
#include "async_copy.cuh"

#ifndef TILE_K
#define TILE_K 16
#endif
#ifndef STAGES
#define STAGES (__CUDA_ARCH__ >= 800 ? 4 : 3)
#endif
constexpr int kTileN = 128, kTileK = TILE_K, kThreads = 256, kColumns = 8;
constexpr int kStages = STAGES;
constexpr int kRowA = kTileK + 4;  // the padding puts eight rows of a warp in different banks
constexpr int kVector = VECTOR;    // floats per copy of activations: 4, or 1 for odd widths

struct Tile {
  int group, row, rows;
};

// acc += A[rows of this thread, kTileK] @ W[kTileK, columns of this thread]
template <int kRows>
__device__ __forceinline__ void multiply(const float* a, const float* w,
                                         float (&acc)[kRows][kColumns]) {
#pragma unroll
  for (int k = 0; k < kTileK; k += 4) {
    float4 a_of_row[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      a_of_row[i] = *reinterpret_cast<const float4*>(a + i * 16 * kRowA + k);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float4 w0 = *reinterpret_cast<const float4*>(w + (k + j) * kTileN);
      float4 w1 = *reinterpret_cast<const float4*>(w + (k + j) * kTileN + 32);
      float columns[kColumns] = {w0.x, w0.y, w0.z, w0.w, w1.x, w1.y, w1.z, w1.w};
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const float4& four = a_of_row[i];
        float element = j == 0 ? four.x : j == 1 ? four.y : j == 2 ? four.z : four.w;
#pragma unroll
        for (int n = 0; n < kColumns; ++n) acc[i][n] = fmaf(element, columns[n], acc[i][n]);
      }
    }
  }
}

// Copies tiles of A and W into the stages of shared memory.
template <int kRows>
struct Loader {
  static constexpr int kPerRow = kTileK / kVector, kStep = kThreads / kPerRow;
  static constexpr int kCopies = (kRows * 16 + kStep - 1) / kStep;
  static constexpr int kStageA = kRows * 16 * kRowA, kStageW = kTileK * kTileN;
  const float* a_of[kCopies];
  const float* w_at;
  float *to_a, *to_w;
  int k_a, k_w, k_end, width;

  __device__ Loader(const float* a_mk, const int* source_m, const float* w_kw, Tile tile,
                    int column, int k, int width, float* shared)
      : k_end(k), width(width) {
    int row = threadIdx.x / kPerRow;
    k_a = threadIdx.x % kPerRow * kVector;
    k_w = threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      int from = tile.row + min(row + i * kStep, tile.rows - 1);  // the last row again, unused
      a_of[i] = a_mk + size_t(source_m ? source_m[from] : from) * k + k_a;
    }
    w_at = w_kw + size_t(k_w) * width + column + threadIdx.x % 32 * 4;
    to_a = shared + row * kRowA + k_a;
    to_w = shared + kStages * kStageA + k_w * kTileN + threadIdx.x % 32 * 4;
  }

  __device__ __forceinline__ void load(int stage, int k) const {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      if (kRows * 16 % kStep && threadIdx.x / kPerRow + i * kStep >= kRows * 16) continue;
      copy_async<4 * kVector>(to_a + stage * kStageA + i * kStep * kRowA, a_of[i] + k,
                              k + k_a < k_end ? 4 * kVector : 0);
    }
#pragma unroll
    for (int i = 0; i < kTileK / 8; ++i)
      copy_async<16>(to_w + stage * kStageW + i * 8 * kTileN, w_at + size_t(k + i * 8) * width,
                     k + k_w + i * 8 < k_end ? 16 : 0);
  }
};

// The products of one tile; `store` is given (row in the tile, column in the block, 8 values),
// whose second four belong 32 columns to the right of the first.
template <int kRows, class Store>
__device__ __forceinline__ void compute_tile(const float* a_mk, const int* source_m,
                                             const float* w_kw, Tile tile, int column, int k,
                                             int width, float* shared, Store store) {
  using Load = Loader<kRows>;
  Load loader(a_mk, source_m, w_kw, tile, column, k, width, shared);
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int my_row = warp / 2 * 4 + lane / 8, my_column = warp % 2 * 64 + lane % 8 * 4;
  const float* a = shared + my_row * kRowA;
  const float* w = shared + kStages * Load::kStageA + my_column;
  float acc[kRows][kColumns] = {};
  int steps = (k + kTileK - 1) / kTileK;
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < steps) loader.load(s, s * kTileK);
    commit_copies();
  }
  for (int s = 0, stage = 0; s < steps; ++s) {
    wait_copies<kStages - 2>();
    __syncthreads();
    int freed = stage == 0 ? kStages - 1 : stage - 1, next = s + kStages - 1;
    if (next < steps) loader.load(freed, next * kTileK);
    commit_copies();
    multiply<kRows>(a + stage * Load::kStageA, w + stage * Load::kStageW, acc);
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i)
    if (my_row + 16 * i < tile.rows) store(my_row + 16 * i, my_column, acc[i]);
}

// Stores up to four columns of a row that has n.
__device__ __forceinline__ void store_four(float* row, int column, int n, const float* values) {
  if (n % 4 == 0 && column < n) {
    *reinterpret_cast<float4*>(row + column) =
        make_float4(values[0], values[1], values[2], values[3]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (column + i < n) row[column + i] = values[i];
  }
}

template <class Store>
__device__ __forceinline__ void compute(const float* a_mk, const int* source_m,
                                        const float* w_gkw, const int4* tiles,
                                        const int* tile_count, int tile_rows, int m, int k,
                                        int width, Store store) {
  extern __shared__ float shared[];
  Tile tile{0, int(blockIdx.y) * tile_rows, min(tile_rows, m - int(blockIdx.y) * tile_rows)};
  if (tiles) {
    if (blockIdx.y >= *tile_count) return;
    int4 listed = tiles[blockIdx.y];
    tile = Tile{listed.x, listed.y, listed.z};
  }
  const float* w_kw = w_gkw + size_t(tile.group) * k * width;
  int column = blockIdx.x * kTileN;
  auto store_row = [&](int row, int in_block, const float* values) {
    store(tile.row + row, column + in_block, values);
  };
#define ROWS(count)                                                                       \
  case count:                                                                             \
    compute_tile<count>(a_mk, source_m, w_kw, tile, column, k, width, shared, store_row); \
    break;
  switch ((tile.rows + 15) / 16) {
    ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) ROWS(7) ROWS(8)
  }
#undef ROWS
}

// out_mn = A @ W + bias_n (null for none)
extern "C" __global__ void __launch_bounds__(kThreads, 2)
    linear(const float* a_mk, const int* source_m, const float* w_gkw, const float* bias_n,
           float* out_mn, const int4* tiles, const int* tile_count, int tile_rows, int m, int k,
           int width, int n) {
  compute(a_mk, source_m, w_gkw, tiles, tile_count, tile_rows, m, k, width,
          [=](int row, int column, const float* values) {
            float sums[kColumns];
#pragma unroll
            for (int i = 0; i < kColumns; ++i) {
              int c = column + i % 4 + i / 4 * 32;
              sums[i] = bias_n && c < n ? values[i] + bias_n[c] : values[i];
            }
            store_four(out_mn + size_t(row) * n, column, n, sums);
            store_four(out_mn + size_t(row) * n, column + 32, n, sums + 4);
          });
}

// out_mn = silu(A @ w1) * (A @ w3); W has 32 columns of w1, then 32 of w3, and so on.
extern "C" __global__ void __launch_bounds__(kThreads, 2)
    gated(const float* a_mk, const int* source_m, const float* w_gkw, float* out_mn,
          const int4* tiles, const int* tile_count, int tile_rows, int m, int k, int width,
          int n) {
  compute(a_mk, source_m, w_gkw, tiles, tile_count, tile_rows, m, k, width,
          [=](int row, int column, const float* values) {
            float products[4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
              products[i] = values[i] / (1 + expf(-values[i])) * values[i + 4];
            store_four(out_mn + size_t(row) * n, column / 64 * 32 + column % 64, n, products);
          });
}
