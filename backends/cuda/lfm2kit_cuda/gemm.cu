// out = A @ W in float32, one fused multiply-add per term: every output element is one chain over
// k, from 0 on, whatever the tile.  So its bits depend neither on the batch nor on the tile menu.
//
//   a_mk    rows of activations, taken in place or gathered through source_m
//   w_gpkc  matrices packed by `transpose` in packing.cu: groups, panels of 256 columns (padded
//           with zeros), k, columns
//   tiles   (group, first row, rows, 0); without a list, rows in steps of tile_rows, group 0
//
// What limits is how fast registers can be filled from shared memory: 128 bytes per cycle and
// multiprocessor, broadcast or not, so that 8 x 8 outputs per thread would keep it as busy as the
// multipliers.  Hence up to 12 x 8 outputs per thread, 128 threads, three blocks per
// multiprocessor (with 16 x 8 there is room for two, which wait for each other too often).  A
// block makes a panel of 16, 32 or 48 rows: an expert with few tokens costs few multiplications.
// Both operands lie in shared memory with k outside; the fragments of the next k, or of several
// where a thread has few rows, are read while this one's are multiplied.
//
// A multiprocessor starts one multiplication per scheduler and cycle only if two of its operands
// come from different banks of registers and the third is kept from the one before.  Hence the
// multiplications go to and fro over the columns, even ones apart from odd; hence too that
// `linear` adds a bias always: stored as they are, four sums would have to lie in the banks of the
// weights that they meet.
#include "async_copy.cuh"

constexpr int kTileN = 256, kTileK = TILE_K, kStages = STAGES, kThreads = 128, kColumns = 8;
constexpr int kCopyK = 8, kCopyRows = kThreads / kCopyK;  // of A, per copy of all threads
constexpr int kCopyRowsW = 4 * kThreads / kTileN;         // of W, likewise

struct Tile {
  int group, row, rows, column;
};

// kRows x kColumns outputs per thread, 4 x 8 threads per warp, 4 warps side by side.
template <int kRows>
struct Product {
  static constexpr int kTileM = kRows * 4;
  static constexpr int kRowA = kTileM + 4;  // puts the 8 k x 4 rows that a warp copies in 32 banks
  static constexpr int kStageA = kTileK * kRowA, kStage = kStageA + kTileK * kTileN;
  static constexpr int kCopiesA = kTileM / kCopyRows;
  static constexpr int kCopiesW = kTileK * kTileN / (4 * kThreads);
  static constexpr int kGroup = kRows < 12 ? 16 / kRows : 1;  // k whose fragments are read at once
  static_assert(kTileK % (2 * kGroup) == 0, "an even number of groups in a stage");

  const float* a_of[kCopiesA];
  const float* w_at;
  float* shared;
  int k, k_a, k_w, to_a, to_w, row, column;

  __device__ Product(const float* a_mk, const int* source_m, const float* w_kc, Tile tile, int k,
                     float* shared)
      : shared(shared), k(k) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    k_a = threadIdx.x % kCopyK;
    int row_a = threadIdx.x / kCopyK;
#pragma unroll
    for (int i = 0; i < kCopiesA; ++i) {
      int from = tile.row + min(row_a + i * kCopyRows, tile.rows - 1);  // the last again, unused
      a_of[i] = a_mk + size_t(source_m ? source_m[from] : from) * k + k_a;
    }
    k_w = threadIdx.x / (kTileN / 4);
    w_at = w_kc + threadIdx.x * 4;
    to_a = k_a * kRowA + row_a;
    to_w = kStageA + threadIdx.x * 4;
    row = lane / 8 * 4;
    column = warp * 64 + lane % 8 * 4;
  }

  // Starts the copies of the next kTileK of k, of which `left` are there; beyond, zeros.
  __device__ __forceinline__ void load(int stage, int left) {
    float* to = shared + stage * kStage;
    if (left >= kTileK) copy(to, [](int) { return true; });
    else copy(to, [=](int in_stage) { return in_stage < left; });
#pragma unroll
    for (int i = 0; i < kCopiesA; ++i) a_of[i] += kTileK;
    w_at += kTileK * kTileN;
  }

  template <class IsThere>
  __device__ __forceinline__ void copy(float* to, IsThere is_there) const {
#pragma unroll
    for (int step = 0; step < kTileK; step += kCopyK)
#pragma unroll
      for (int i = 0; i < kCopiesA; ++i)
        copy_async<4>(to + to_a + step * kRowA + i * kCopyRows, a_of[i] + step,
                      is_there(step + k_a) ? 4 : 0);
#pragma unroll
    for (int i = 0; i < kCopiesW; ++i)
      copy_async<16>(to + to_w + i * kCopyRowsW * kTileN, w_at + i * kCopyRowsW * kTileN,
                     is_there(i * kCopyRowsW + k_w) ? 16 : 0);
  }

  struct Fragment {
    float a[kRows], w[kColumns];
  };

  __device__ __forceinline__ void read(Fragment (&fragments)[kGroup], int stage,
                                       int in_stage) const {
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      const float* a = shared + stage * kStage + (in_stage + g) * kRowA + row;
      const float* w = shared + stage * kStage + kStageA + (in_stage + g) * kTileN + column;
#pragma unroll
      for (int i = 0; i < kRows; i += 4)
        *reinterpret_cast<float4*>(fragments[g].a + i) = *reinterpret_cast<const float4*>(a + 4 * i);
#pragma unroll
      for (int i = 0; i < kColumns; i += 4)
        *reinterpret_cast<float4*>(fragments[g].w + i) = *reinterpret_cast<const float4*>(w + 8 * i);
    }
  }

  __device__ __forceinline__ void multiply(const Fragment (&fragments)[kGroup],
                                           float (&acc)[kRows][kColumns]) const {
#pragma unroll
    for (int g = 0; g < kGroup; ++g)
#pragma unroll
      for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          int to = i % 2 ? kColumns - 1 - j : j, n = to % 4 * 2 + to / 4;  // evens, then odds
          acc[i][n] = fmaf(fragments[g].a[i], fragments[g].w[n], acc[i][n]);
        }
  }

  __device__ __forceinline__ void run(float (&acc)[kRows][kColumns]) {
    int steps = (k + kTileK - 1) / kTileK, stage = 0;
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) {
      if (s < steps) load(s, k - s * kTileK);
      commit_copies();
    }
    wait_copies<kStages - 2>();
    __syncthreads();
    Fragment fragments[2][kGroup];
    read(fragments[0], 0, 0);
    for (int s = 0; s < steps; ++s) {
      int next = s + kStages - 1;
      if (next < steps) load(stage == 0 ? kStages - 1 : stage - 1, k - next * kTileK);
      commit_copies();
#pragma unroll
      for (int in_stage = 0; in_stage < kTileK; in_stage += kGroup) {
        int group = in_stage / kGroup;
        if (in_stage + kGroup == kTileK) {
          stage = stage + 1 == kStages ? 0 : stage + 1;
          wait_copies<kStages - 2>();
          __syncthreads();
        }
        read(fragments[(group + 1) % 2], stage, (in_stage + kGroup) % kTileK);
        multiply(fragments[group % 2], acc);
      }
    }
  }
};

// The products of one tile; `store` is given the row and column of 8 values, whose second four
// belong 32 columns to the right of the first.
template <int kRows, class Store>
__device__ __forceinline__ void compute_tile(const float* a_mk, const int* source_m,
                                             const float* w_gpkc, Tile tile, int k, int width,
                                             Store store) {
  extern __shared__ float shared[];
  const float* w_kc = w_gpkc + (size_t(tile.group) * width + tile.column) * k;
  Product<kRows> product(a_mk, source_m, w_kc, tile, k, shared);
  float acc[kRows][kColumns] = {};
  product.run(acc);
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    int row = product.row + i / 4 * 16 + i % 4;
    if (row < tile.rows) store(tile.row + row, tile.column + product.column, acc[i]);
  }
}

template <class Store>
__device__ __forceinline__ void compute(const float* a_mk, const int* source_m,
                                        const float* w_gpkc, const int4* tiles,
                                        const int* tile_count, int tile_rows, int m, int k,
                                        int width, Store store) {
  int row = blockIdx.y * tile_rows;
  Tile tile{0, row, min(tile_rows, m - row), int(blockIdx.x) * kTileN};
  if (tiles) {
    if (blockIdx.y >= *tile_count) return;
    int4 listed = tiles[blockIdx.y];
    tile.group = listed.x, tile.row = listed.y, tile.rows = listed.z;
  }
  if (tile.rows > 32) compute_tile<12>(a_mk, source_m, w_gpkc, tile, k, width, store);
  else if (tile.rows > 16) compute_tile<8>(a_mk, source_m, w_gpkc, tile, k, width, store);
  else compute_tile<4>(a_mk, source_m, w_gpkc, tile, k, width, store);
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

// out_mn = A @ W + bias_n (null for none)
extern "C" __global__ void __launch_bounds__(kThreads, 3)
    linear(const float* a_mk, const int* source_m, const float* w_gpkc, const float* bias_n,
           float* out_mn, const int4* tiles, const int* tile_count, int tile_rows, int m, int k,
           int width, int n) {
  compute(a_mk, source_m, w_gpkc, tiles, tile_count, tile_rows, m, k, width,
          [=](int row, int column, const float* values) {
            float sums[kColumns];
#pragma unroll
            for (int i = 0; i < kColumns; ++i) {
              int c = column + i % 4 + i / 4 * 32;
              sums[i] = values[i] + (bias_n && c < n ? bias_n[c] : 0);
            }
            store_four(out_mn + size_t(row) * n, column, n, sums);
            store_four(out_mn + size_t(row) * n, column + 32, n, sums + 4);
          });
}

// out_mn = silu(A @ w1) * (A @ w3); W has 32 columns of w1, then 32 of w3, and so on.
extern "C" __global__ void __launch_bounds__(kThreads, 3)
    gated(const float* a_mk, const int* source_m, const float* w_gpkc, float* out_mn,
          const int4* tiles, const int* tile_count, int tile_rows, int m, int k, int width,
          int n) {
  compute(a_mk, source_m, w_gpkc, tiles, tile_count, tile_rows, m, k, width,
          [=](int row, int column, const float* values) {
            float products[4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
              products[i] = values[i] / (1 + expf(-values[i])) * values[i + 4];
            store_four(out_mn + size_t(row) * n, column / 64 * 32 + column % 64, n, products);
          });
}
