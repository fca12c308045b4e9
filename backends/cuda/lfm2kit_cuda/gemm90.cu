// out = A @ W.T on Hopper's tensor cores (wgmma): as gemm16.cu, with the same operands, tiles and
// interleaving of w1 and w3, for chips of compute capability 9.0.  HALF is BF16 or F16.
//
// A block of two warpgroups makes 128 rows x 256 columns, a warpgroup 64 rows; or 64 rows x 256,
// 128 or 64 columns, a warpgroup half of the columns.  Every output element is the same chain over
// k in all of them.  Threads copy both operands to shared memory 16 bytes at a time, so that rows
// can be gathered; the matrix instructions read them there, and run on while the next are started.
#include "async_copy.cuh"
#include "tile16.cuh"
#include "wgmma.cuh"

constexpr int kRowBytes = kTileK * 2, kBlocks = 1;

template <int kTileM, int kTileN>
struct Product {
  static constexpr int kColumns = kTileM == 128 ? kTileN : kTileN / 2;  // of a warpgroup
  static constexpr int kStage = (kTileM + kTileN) * kRowBytes;
  static constexpr int kStages = SHARED_BYTES / kStage < 8 ? SHARED_BYTES / kStage : 8;
  static constexpr int kAhead = kStages - 2;  // the stage before last may still be multiplied
  static constexpr int kCopiesA = kTileM / kCopyRows, kCopiesW = kTileN / kCopyRows;

  const HALF* a_of[kCopiesA];
  const HALF* w_at;
  char* shared;
  int k, chunk, copy_row, row, column;

  __device__ Product(const HALF* a_mk, const int* source_m, const HALF* w_nk, Tile tile, int k,
                     char* shared)
      : shared(shared), k(k) {
    chunk = threadIdx.x % kChunks;
    copy_row = threadIdx.x / kChunks;
#pragma unroll
    for (int i = 0; i < kCopiesA; ++i) {
      int from = tile.row + min(copy_row + i * kCopyRows, tile.rows - 1);  // the last again
      a_of[i] = a_mk + size_t(source_m ? source_m[from] : from) * k + chunk * kChunk;
    }
    w_at = w_nk + size_t(tile.column + copy_row) * k + chunk * kChunk;
    int warpgroup = threadIdx.x / 128;
    row = kTileM == 128 ? warpgroup * 64 : 0;
    column = kTileM == 128 ? 0 : warpgroup * kColumns;
  }

  __device__ __forceinline__ void load(int stage, int k0) const {
    int wanted = k0 + chunk * kChunk < k ? 16 : 0;
    char* a = shared + stage * kStage;
#pragma unroll
    for (int i = 0; i < kCopiesA; ++i)
      copy_async<16>(a + swizzled(copy_row + i * kCopyRows, chunk), a_of[i] + k0, wanted);
    char* w = a + kTileM * kRowBytes;
#pragma unroll
    for (int i = 0; i < kCopiesW; ++i)
      copy_async<16>(w + swizzled(copy_row + i * kCopyRows, chunk),
                     w_at + size_t(i * kCopyRows) * k + k0, wanted);
  }

  __device__ __forceinline__ void multiply_stage(int stage, float (&acc)[kColumns / 2]) const {
    u32 a = shared_address(shared + stage * kStage) + row * kRowBytes;
    u32 w = shared_address(shared + stage * kStage) + (kTileM + column) * kRowBytes;
    wgmma_begin();
#pragma unroll
    for (int step = 0; step < kTileK / 16; ++step)
      Wgmma<kColumns>::multiply(acc, matrix_descriptor(a + step * 32),
                                matrix_descriptor(w + step * 32));
    wgmma_commit();
  }

  __device__ __forceinline__ void run(float (&acc)[kColumns / 2]) const {
    int steps = (k + kTileK - 1) / kTileK, stage = 0, free = kAhead;
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
      if (s < steps) load(s, s * kTileK);
      commit_copies();
    }
    for (int s = 0; s < steps; ++s) {
      wait_copies<kAhead - 1>();
      fence_copies();
      __syncthreads();  // all have copied stage s, and multiplied stage s - 2
      multiply_stage(stage, acc);
      if (s + kAhead < steps) load(free, (s + kAhead) * kTileK);
      commit_copies();
      wgmma_wait<1>();
      stage = stage + 1 == kStages ? 0 : stage + 1;
      free = free + 1 == kStages ? 0 : free + 1;
    }
    wgmma_wait<0>();
  }
};

// The products of one tile; `store` is given a row and column, and the sums of two columns there
// and of two in the next block of 8.
template <int kTileM, int kTileN, class Store>
__device__ __forceinline__ void compute_tile(const HALF* a_mk, const int* source_m,
                                             const HALF* w_gnk, Tile tile, int k, int width,
                                             Store store) {
  extern __shared__ __align__(1024) char shared[];
  using Mine = Product<kTileM, kTileN>;
  tile.column = blockIdx.x * kTileN;
  const HALF* w_nk = w_gnk + size_t(tile.group) * width * k;
  Mine product(a_mk, source_m, w_nk, tile, k, shared);
  float acc[Mine::kColumns / 2] = {};
  product.run(acc);
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int row = product.row + warp * 16 + half * 8 + lane / 4;
    if (row >= tile.rows) continue;
#pragma unroll
    for (int n = 0; n < Mine::kColumns / 8; n += 2)
      store(tile.row + row, tile.column + product.column + n * 8 + lane % 4 * 2,
            acc + n * 4 + half * 2, acc + n * 4 + 4 + half * 2);
  }
}

template <class Store>
__device__ __forceinline__ void compute(const HALF* a_mk, const int* source_m, const HALF* w_gnk,
                                        const int4* tiles, const int* tile_count, int tile_rows,
                                        int m, int k, int width, Store store) {
  int row = blockIdx.y * tile_rows, columns = width / gridDim.x;
  Tile tile{0, row, min(tile_rows, m - row), 0};
  if (tiles) {
    if (blockIdx.y >= *tile_count) return;
    int4 listed = tiles[blockIdx.y];
    tile.group = listed.x, tile.row = listed.y, tile.rows = listed.z;
  }
  if (tile.rows > 64) compute_tile<128, 256>(a_mk, source_m, w_gnk, tile, k, width, store);
  else if (columns == 256) compute_tile<64, 256>(a_mk, source_m, w_gnk, tile, k, width, store);
  else if (columns == 128) compute_tile<64, 128>(a_mk, source_m, w_gnk, tile, k, width, store);
  else compute_tile<64, 64>(a_mk, source_m, w_gnk, tile, k, width, store);
}

#include "kernels16.cuh"
