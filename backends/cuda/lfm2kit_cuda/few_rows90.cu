// out = A @ W.T of few rows on Hopper: the sums of gemm90.cu, with its instruction, its order and so its
// bits.  Few rows take as long as reading W does, so what counts is that all SMs read, and that many
// bytes are on their way all the time.  HALF is BF16 or F16.
//
//   a         rows of activations in slabs (slabs.cuh)
//   w_gpsrk   matrices packed by `panel` in packing.cu: [groups][width / 256][steps][256][64]
//   tiles     (group, first row, rows, the group's first tile | its tiles << 16) of up to kMostRows
//             rows; without a list, all m rows, group 0
//
// A panel has sixteen blocks of 16 columns, of which a slab's 2 KB are consecutive.  A CTA takes 1 to 8
// blocks of a tile (`blocks`), with all k.  Some warps copy a stage of 64 k each, one after the other, and a
// warpgroup multiplies.
//
// The instruction always multiplies 64 rows of W, one block for each warp.  Where there are fewer
// blocks, it reads what lies behind them in shared memory, and those sums are not stored.
#include "dependent.cuh"
#include "epilogue90.cuh"
#include "ring.cuh"
#include "slabs.cuh"
#include "uniform.cuh"
#include "wgmma.cuh"

constexpr int kTileK = kSlabK, kRowBytes = kTileK * 2;
constexpr int kBlock = BLOCK, kBlocks = PANEL / kBlock, kBlockBytes = kBlock * kRowBytes;
constexpr int kMultiplying = 128, kWarps = kMultiplying / 32, kCopyingWarps = COPYING_WARPS;
constexpr int kThreads = kMultiplying + 32 * kCopyingWarps;
static_assert(PANEL == 256 && BLOCK == 16, "`column_of`, a warp's 16 rows");
constexpr int kMostRows = MOST_ROWS, kStep = 8;
constexpr int kPending = 2;  // stages that the tensor cores may still be reading
static_assert(kMostRows == 2 * kStep, "`compute` has a loop for each number of rows");
static_assert(MOST_BLOCKS == 2 * kWarps, "and for each number of instructions");

extern __shared__ __align__(1024) float shared[];        // the ring's stages
__shared__ u64 filled[kMostStages], read_by[kMostStages];  // their barriers

struct Operands {
  const HALF* a;
  const HALF* w_gpsrk;
  const int4* tiles;
  const int* tile_count;
  int m, extent, steps, width;  // rows of activations, and of a slab; stages in all of k
  int blocks;
};

struct Tile {
  int group, row, rows, block;  // rows < 0: there is none
};

// The tiles of a group follow each other for each range of columns, so that its weights are read from
// memory once.
__device__ inline Tile tile_at(int index, const Operands& of) {
  int ranges = (of.width / kBlock + of.blocks - 1) / of.blocks;
  if (index >= (of.tiles ? *of.tile_count : 1) * ranges) return {0, 0, -1, 0};
  if (!of.tiles) return {0, 0, of.m, index * of.blocks};
  int siblings = of.tiles[index / ranges].w, first = siblings & 0xffff, count = siblings >> 16;
  int turn = index - first * ranges;
  int4 listed = of.tiles[first + turn % count];
  return {listed.x, listed.y, listed.z, turn / count * of.blocks};
}

__device__ inline Tile uniform(const Tile& tile) {
  return {uniform(tile.group), uniform(tile.row), uniform(tile.rows), uniform(tile.block)};
}

// The first column of a block (`place_of` in packing.cu); beside it are columns 1, 4, 5, 8, 9, ...
__device__ inline int column_of(int block) {
  int half = block / 8 % 2, pair = block / 4 % 2, warp = block % 4;
  return block / kBlocks * PANEL + half * 128 + warp * 32 + pair * 2;
}

// The weights of a tile, of which each lane copies a block.
struct Weights {
  const char* from;
  int count;  // of blocks

  __device__ __forceinline__ Weights(const Tile& tile, const Operands& of) {
    int all = of.width / kBlock, block = tile.block + threadIdx.x % 32;
    size_t panel = size_t(tile.group) * (all / kBlocks) + block / kBlocks;
    from = reinterpret_cast<const char*>(of.w_gpsrk) +
           (panel * of.steps * kBlocks + block % kBlocks) * kBlockBytes;
    count = min(of.blocks, all - tile.block);
  }

  // Starts the copy of step s to the ring's stage.
  __device__ __forceinline__ void copy(const Ring& ring, int s) const {
    int lane = threadIdx.x % 32;
    u64* its = ring.filled + ring.stage;
    if (lane == 0) barrier_promise(its, count * kBlockBytes);
    if (lane < count)
      copy_bulk(ring.at() + lane * kBlockBytes, from + size_t(s) * kBlocks * kBlockBytes,
                kBlockBytes, its);
  }
};

// The activations of a tile.  Rows beyond the last are whatever lay there, and their sums are not stored.
struct Activations {
  const char* from;
  size_t slab;
  int bytes;

  __device__ __forceinline__ Activations(const Tile& tile, const Operands& of)
      : from(reinterpret_cast<const char*>(of.a) + size_t(tile.row) * kRowBytes),
        slab(size_t(of.extent) * kRowBytes),
        bytes(min(tile.rows > kStep ? kMostRows : kStep, of.extent - tile.row) * kRowBytes) {}

  // Starts the copy of step s to the ring's stage, which waits for nothing else.
  __device__ __forceinline__ void copy(const Ring& ring, const Operands& of, int s) const {
    if (threadIdx.x % 32) return;
    u64* its = ring.filled + ring.stage;
    barrier_promise(its, bytes);
    copy_bulk(ring.at() + of.blocks * kBlockBytes, from + s * slab, bytes, its);
    barrier_arrive(its);
  }
};

// Whether this warp copies the CTA's nth stage, counted over all of its tiles: then it has waited for a
// stage less than a turn of the ring before, and takes no phase of a barrier for another.
__device__ __forceinline__ bool is_mine(int n) {
  return n % kCopyingWarps == int(threadIdx.x - kMultiplying) / 32;
}

// Copies the first weights of a dense layer, which may be read before the kernel ahead of this one has ended:
// they were packed at load, at least one kernel before it.  Returns the number of stages that are copied.
__device__ inline int copy_first_weights(Ring ring, const Operands& of) {
  if (of.tiles) return 0;
  int stages = min(ring.count, of.steps);
  Weights weights(tile_at(blockIdx.x, of), of);
  for (int s = 0; s < stages; ++s, ring.next())
    if (is_mine(s)) weights.copy(ring, s);
  return stages;
}

// Fills the ring's stages with the operands of this CTA's tiles.
__device__ __forceinline__ void copy_tiles(Ring ring, const Operands& of) {
  int ahead = copy_first_weights(ring, of), n = 0;
  wait_for_previous();
  for (int index = blockIdx.x;; index += gridDim.x, ahead = 0) {
    Tile tile = tile_at(index, of);
    if (tile.rows < 0) break;
    Weights weights(tile, of);
    Activations activations(tile, of);
    for (int s = 0; s < of.steps; ++s, ++n, ring.next()) {
      if (!is_mine(n)) continue;
      __syncwarp();  // a lane that copies nothing must not fall behind by two turns of the ring
      ring.wait_until_read();
      if (s >= ahead) weights.copy(ring, s);
      activations.copy(ring, of, s);
    }
  }
  let_next_start();
}

// The sums of a thread, as Wgmma holds them: of n rows, with `kInstructions` times four blocks.
template <int n, int kInstructions>
using Sums = float[kInstructions][n / 2];

// Gives a stage of the ring back to the warp that copies.
__device__ inline void release(const Ring& ring, int stage) {
  if (threadIdx.x % 32 == 0) barrier_arrive(ring.read + stage);
}

// sums = the products of all stages
template <int n, int kInstructions>
__device__ __forceinline__ void sum_stages(Sums<n, kInstructions>& sums, Ring& ring, const Operands& of) {
  Ring behind = ring;
  for (int s = 0; s < of.steps; ++s, ring.next()) {
    ring.wait_until_filled();
    u64 w = matrix_descriptor(shared_address(ring.at()));
    u64 a = matrix_descriptor(shared_address(ring.at() + of.blocks * kBlockBytes));
    wgmma_begin();
#pragma unroll
    for (int step = 0; step < kTileK / 16; ++step)
#pragma unroll
      for (int i = 0; i < kInstructions; ++i)
        Wgmma<n>::multiply(sums[i], w + i * kWarps * kBlockBytes / 16 + step * 2, a + step * 2,
                           step > 0 || s > 0);
    wgmma_commit();
    wgmma_wait<kPending>();
    if (s >= kPending) release(ring, behind.stage), behind.next();
  }
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < kInstructions; ++i) wgmma_end<n / 2>(sums[i]);
  for (; behind.stage != ring.stage; behind.next()) release(ring, behind.stage);
}

// Stores what a thread has of the blocks of its warp: two neighbouring columns of every fourth pair of rows.
template <int n, int kInstructions, class Store>
__device__ __forceinline__ void store_sums(const Sums<n, kInstructions>& sums, const Tile& tile,
                                           const Operands& of, const Store& store) {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int count = min(of.blocks, of.width / kBlock - tile.block);
#pragma unroll
  for (int i = 0; i < kInstructions; ++i) {
    if (warp + i * kWarps >= count) break;
    int column = column_of(tile.block + warp + i * kWarps) + lane / 4 * 4;
#pragma unroll
    for (int r = 0; r < n / 4; ++r) {
      int row = r / 2 * kStep + lane % 4 * 2 + r % 2, at = r / 2 * 4 + r % 2;
      if (row < tile.rows) store(tile.row + row, column, sums[i][at], sums[i][at + 2]);
    }
  }
}

template <int n, int kInstructions, class Store>
__device__ __forceinline__ void multiply_tile(Ring& ring, const Tile& tile, const Operands& of,
                                              const Store& store) {
  Sums<n, kInstructions> sums;
  sum_stages<n, kInstructions>(sums, ring, of);
  store_sums<n, kInstructions>(sums, tile, of, store);
}

template <int n, class Store>
__device__ __forceinline__ void multiply_tile(Ring& ring, const Tile& tile, const Operands& of,
                                              const Store& store) {
  if (of.blocks > kWarps) multiply_tile<n, 2>(ring, tile, of, store);
  else multiply_tile<n, 1>(ring, tile, of, store);
}

template <class Store>
__device__ __forceinline__ void multiply_tiles(Ring ring, const Operands& of, const Store& store) {
  wait_for_previous();
  int index = blockIdx.x;
  Tile tile = uniform(tile_at(index, of));
  while (tile.rows >= 0) {
    Tile next = tile_at(index += gridDim.x, of);  // early: it takes two reads from memory
    if (tile.rows > kStep) multiply_tile<kMostRows>(ring, tile, of, store);
    else multiply_tile<kStep>(ring, tile, of, store);
    tile = uniform(next);
  }
}

template <class Store>
__device__ __forceinline__ void compute(const Operands& of, int stages, int stage_bytes,
                                        const Store& store) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < stages; ++i) {
      barrier_init(filled + i, 1);
      barrier_init(read_by + i, kWarps);
    }
    fence_stores();
  }
  __syncthreads();
  Ring ring{reinterpret_cast<char*>(shared), filled, read_by, stages, stage_bytes};
  if (threadIdx.x < kMultiplying) multiply_tiles(ring, of, store);
  else copy_tiles(ring, of);
}

// out_mn = A @ W.T + bias_n (null for none), as `Stored`
#define LINEAR(name, Stored)                                                                     \
  extern "C" __global__ void __launch_bounds__(kThreads)                                         \
      name(const HALF* a, const HALF* w_gpsrk, const float* bias_n, Stored* out_mn,              \
           const int4* tiles, const int* tile_count, int m, int extent, int steps, int width,    \
           int n, int blocks, int stages, int stage_bytes) {                                     \
    compute({a, w_gpsrk, tiles, tile_count, m, extent, steps, width, blocks}, stages,            \
            stage_bytes, LinearPair<Stored>{bias_n, out_mn, n});                                 \
  }
LINEAR(linear_few_wgmma, F32)
LINEAR(linear_rounded_few_wgmma, HALF)

// out = silu(A @ w1.T) * (A @ w3.T) * GATED_SCALE, n channels in slabs of the same extent, where
// the rows of W are one of w1, one of w3, and so on
extern "C" __global__ void __launch_bounds__(kThreads)
    gated_few_wgmma(const HALF* a, const HALF* w_gpsrk, HALF* out, const int4* tiles,
                    const int* tile_count, int m, int extent, int steps, int width, int n,
                    int blocks, int stages, int stage_bytes) {
  compute({a, w_gpsrk, tiles, tile_count, m, extent, steps, width, blocks}, stages,
          stage_bytes, GatedPair{out, n, extent});
}
