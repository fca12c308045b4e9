// out = A @ W.T of few rows on Hopper.  They take as long as reading W does, so what counts is that all SMs
// read, that many bytes are on their way all the time, and that no sum waits longer for its next
// product than it must.  HALF is BF16 or F16.
//
//   a         rows of activations in slabs (slabs.cuh)
//   source    null, or the row of `a` that each row of the result has
//   w_gpsrk   matrices packed by `panel` in packing.cu: [groups][width / 256][steps][256][64]
//   tiles     (group, first row, rows, the group's first tile | its tiles << 16) of up to kMostRows
//             rows; without a list, all m rows, group 0
//
// A panel has sixteen blocks of 16 columns, of which a slab's 2 KB are consecutive.  A CTA takes 1 to 8
// blocks of a tile (`blocks`), with all k.  Some warps copy a stage of 64 k each, one after the other, and a
// warp for each block multiplies with mma.sync, which has the bits of gemm90.cu's wgmma.
#include "dependent.cuh"
#include "epilogue90.cuh"
#include "mma.cuh"
#include "ring.cuh"
#include "slabs.cuh"
#include "uniform.cuh"

constexpr int kTileK = kSlabK, kRowBytes = kTileK * 2, kWarp = 32;
constexpr int kBlock = BLOCK, kBlocks = PANEL / kBlock, kBlockBytes = kBlock * kRowBytes;
constexpr int kCopyingWarps = COPYING_WARPS, kMostThreads = kWarp * (kCopyingWarps + MOST_BLOCKS);
static_assert(PANEL == 256 && BLOCK == 16, "`column_of`, and the rows that an instruction multiplies");
constexpr int kMostRows = MOST_ROWS, kStep = 8;
static_assert(kMostRows == 2 * kStep, "`multiply_tiles` has a loop for each number of rows");

extern __shared__ __align__(1024) float shared[];        // the ring's stages
__shared__ u64 filled[kMostStages], read_by[kMostStages];  // their barriers

struct Operands {
  const HALF* a;
  const int* source;
  const HALF* w_gpsrk;
  const int4* tiles;
  const int* tile_count;
  int are_known;                // the tiles, before the kernel ahead of this one has ended
  int most;                     // tiles of the list
  int m, extent, steps, width;  // rows of the result, and of a slab of `a`; stages in all of k
  int blocks;
  int is_alone;  // a CTA on its SM
};

struct Tile {
  int group, row, rows, block;  // rows < 0: there is none
};

// How many tiles there are, each of which has all ranges of columns.
__device__ inline int tiles_of(const Operands& of) {
  return of.tiles ? early(of.tile_count) : 1;
}

// Returns the index-th tile and range of columns of `count` tiles.  The tiles of a group follow each other
// for each range, so that its weights are read from memory once.  No load waits for the count.
__device__ inline Tile tile_at(int index, int count, const Operands& of) {
  int ranges = (of.width / kBlock + of.blocks - 1) / of.blocks;
  bool is_there = index < count * ranges;
  if (!of.tiles) return {0, 0, is_there ? of.m : -1, index * of.blocks};
  int4 listed = early(of.tiles + min(index / ranges, of.most - 1));
  int first = listed.w & 0xffff, siblings = listed.w >> 16, turn = index - first * ranges;
  if (is_there && siblings > 1) listed = early(of.tiles + first + turn % siblings);
  return {listed.x, listed.y, is_there ? listed.z : -1, turn / max(siblings, 1) * of.blocks};
}

__device__ inline Tile uniform(const Tile& tile) {
  return {uniform(tile.group), uniform(tile.row), uniform(tile.rows), uniform(tile.block)};
}

// The first column of a block (`place_of` in packing.cu); beside it are columns 1, 4, 5, 8, 9, ...
__device__ inline int column_of(int block) {
  int half = block / 8 % 2, pair = block / 4 % 2, warp = block % 4;
  return block / kBlocks * PANEL + half * 128 + warp * 32 + pair * 2;
}

// What a lane copies of each stage of a tile.
struct Piece {
  const char* from;
  size_t stride;  // bytes from a stage's to the next one's
  int to, bytes;  // in a stage; no bytes: there is nothing to copy

  // Starts the copy for step s to the ring's stage.
  __device__ __forceinline__ void start(const Ring& ring, int s) const {
    if (bytes) copy_bulk(ring.at() + to, from + s * stride, bytes, ring.filled + ring.stage);
  }
};

constexpr int kCopyWeights = MOST_BLOCKS;  // lanes; the others copy activations
static_assert(kCopyWeights + kMostRows <= kWarp, "a lane for each block and each row");

__device__ inline int weights_bytes(const Tile& tile, const Operands& of) {
  return min(of.blocks, of.width / kBlock - tile.block) * kBlockBytes;
}

// The weights of a block of a tile; nothing for other lanes.
__device__ __forceinline__ Piece weights_of(const Tile& tile, const Operands& of) {
  int lane = threadIdx.x % kWarp, all = of.width / kBlock, block = tile.block + lane;
  size_t panel = size_t(tile.group) * (all / kBlocks) + block / kBlocks;
  const char* from = reinterpret_cast<const char*>(of.w_gpsrk) +
                     (panel * of.steps * kBlocks + block % kBlocks) * kBlockBytes;
  bool has_one = lane < min(of.blocks, all - tile.block);
  return {from, kBlocks * kBlockBytes, lane * kBlockBytes, has_one ? kBlockBytes : 0};
}

// The activations of a tile: one lane copies consecutive rows, or each its own; nothing for the lanes
// of weights.  Behind the rows is whatever lay there, and its sums are not stored.
__device__ __forceinline__ Piece activations_of(const Tile& tile, const Operands& of) {
  int lane = threadIdx.x % kWarp - kCopyWeights, count = of.source ? tile.rows : 1;
  bool has_one = lane >= 0 && lane < count;
  int row = tile.row + (has_one && of.source ? lane : 0);
  if (of.source) row = of.source[row];
  const char* from = reinterpret_cast<const char*>(of.a) + size_t(row) * kRowBytes;
  int bytes = !has_one ? 0 : of.source ? kRowBytes : tile.rows * kRowBytes;
  return {from, size_t(of.extent) * kRowBytes, of.blocks * kBlockBytes + lane * kRowBytes, bytes};
}

// Copies the first weights of a CTA, before anything is known of its rows; begins with stage `first`.
// Returns the number of stages.
__device__ inline int copy_first_weights(Ring ring, int first, const Tile& tile,
                                         const Operands& of) {
  int stages = min(ring.count, of.steps), bytes = weights_bytes(tile, of);
  Piece weights = weights_of(tile, of);
  for (int s = first; s < stages; s += kCopyingWarps, ring.skip(kCopyingWarps)) {
    if (threadIdx.x % kWarp == 0) barrier_promise(ring.filled + ring.stage, bytes);
    weights.start(ring, s);
  }
  return stages;
}

// Fills the ring's stages with the operands of this CTA's tiles.  Of all stages that follow each other, a
// warp copies every kCopyingWarps-th one.  So it has waited for a stage less than a turn of the ring
// before, and takes no phase of a barrier for another.
//
// Weights may be read before the kernel ahead of this one has ended: they were packed at load, at least one
// kernel before it.  Where the next kernel is a product of the same tiles, and there is room for its CTAs only
// where one of this kernel has ended, it starts there, and does that.
template <bool is_gated>
__device__ __forceinline__ void copy_tiles(Ring ring, const Operands& of) {
  int s = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, index = blockIdx.x;
  ring.skip(s);
  if (!of.are_known) wait_for_previous();
  int tiles = tiles_of(of);
  Tile tile = tile_at(index, tiles, of);
  int ahead = tile.rows < 0 ? 0 : copy_first_weights(ring, s, tile, of);
  wait_for_previous();
  if (is_gated && of.tiles && of.is_alone) let_next_start();
  for (; tile.rows >= 0; ahead = 0) {
    Piece weights = weights_of(tile, of), piece = activations_of(tile, of);
    if (lane < kCopyWeights) piece = weights;
    int of_weights = weights_bytes(tile, of), of_rows = tile.rows * kRowBytes;
    for (; s < of.steps; s += kCopyingWarps, ring.skip(kCopyingWarps)) {
      bool has_weights = s < ahead;
      __syncwarp();  // a lane that copies nothing must not fall behind by two turns of the ring
      ring.wait_until_read();
      if (lane == 0)
        barrier_arrive_promising(ring.filled + ring.stage, (has_weights ? 0 : of_weights) + of_rows);
      if (lane >= kCopyWeights || !has_weights) piece.start(ring, s);
    }
    s -= of.steps;
    // Not before the copies: they would wait for the list, which the warps that multiply have read by now.
    tile = tile_at(index += gridDim.x, tiles, of);
  }
  let_next_start();
}

// Where a lane finds its part of the operands in a stage, for read_matrices: 16 rows of weights, and
// rows of activations, whose chunks are swizzled by the rows that they were in `a`.
template <int n>
struct Places {
  u32 weights, activations[n / kStep];  // of the first two or four chunks; others differ by xor

  __device__ __forceinline__ Places(const Tile& tile, const Operands& of, int block) {
    int lane = threadIdx.x % kWarp, row = lane % kBlock;
    weights = block * kBlockBytes + row * kRowBytes + (lane / 16 ^ row % 8) * 16;
#pragma unroll
    for (int i = 0; i < n / kStep; ++i) {
      int row = i * kStep + lane % 8;
      int source = of.source ? of.source[tile.row + min(row, tile.rows - 1)] : row;
      activations[i] = of.blocks * kBlockBytes + row * kRowBytes + (lane / 8 ^ source % 8) * 16;
    }
  }
};

// What a lane has of the operands of a stage.
template <int n>
struct Operand {
  u32 w[kTileK / 16][4], a[kTileK / 32][n / kStep][4];

  // Reads what belongs to 32 k.
  __device__ __forceinline__ void read(const Ring& ring, const Places<n>& places, int half) {
    u32 stage = shared_address(ring.at());
#pragma unroll
    for (int i = 0; i < n / kStep; ++i)
      read_matrices(a[half][i], stage + (places.activations[i] ^ half * 64));
#pragma unroll
    for (int k = 2 * half; k < 2 * half + 2; ++k)
      read_matrices(w[k], stage + (places.weights ^ k * 32));
  }

  // sums += the products of 16 k
  __device__ __forceinline__ void multiply(float (&sums)[n / 2], int k) const {
#pragma unroll
    for (int i = 0; i < n / kStep; ++i)
      ::multiply(sums + i * 4, w[k], a[k / 2][i][k % 2 * 2], a[k / 2][i][k % 2 * 2 + 1]);
  }
};

// Gives a stage of the ring back to the warp that copies.
__device__ __forceinline__ void release(const Ring& ring) {
  __syncwarp();
  if (threadIdx.x % kWarp == 0) barrier_arrive(ring.read + ring.stage);
}

// sums += the products of a stage, and reads the operands of the next one.  A warp issues in order, so
// what else there is to do stands where a product waits for the one before.
template <int n>
__device__ __forceinline__ void multiply_stage(float (&sums)[n / 2], const Operand<n>& now,
                                               Operand<n>& next, Ring& ring,
                                               const Places<n>& places) {
  Ring behind = ring;
  ring.next();
  now.multiply(sums, 0);
  ring.wait_until_filled();
  now.multiply(sums, 1);
  next.read(ring, places, 0);
  now.multiply(sums, 2);
  next.read(ring, places, 1);
  now.multiply(sums, 3);
  release(behind);
}

template <int n>
__device__ __forceinline__ void multiply_last_stage(float (&sums)[n / 2], const Operand<n>& now,
                                                    Ring& ring) {
#pragma unroll
  for (int k = 0; k < kTileK / 16; ++k) now.multiply(sums, k);
  release(ring);
  ring.next();
}
static_assert(kTileK == 4 * 16, "`multiply_stage`");

// sums = the products of all stages
template <int n>
__device__ __forceinline__ void sum_stages(float (&sums)[n / 2], Ring& ring, const Operands& of,
                                           const Places<n>& places) {
  Operand<n> even, odd;
  ring.wait_until_filled();
  even.read(ring, places, 0);
  even.read(ring, places, 1);
  for (int s = 2; s < of.steps; s += 2) {
    multiply_stage<n>(sums, even, odd, ring, places);
    multiply_stage<n>(sums, odd, even, ring, places);
  }
  if (of.steps % 2) {
    multiply_last_stage<n>(sums, even, ring);
  } else {
    multiply_stage<n>(sums, even, odd, ring, places);
    multiply_last_stage<n>(sums, odd, ring);
  }
}

// Stores what a lane has of its warp's block: two neighbouring columns of every fourth pair of rows.
template <int n, class Store>
__device__ __forceinline__ void store_sums(const float (&sums)[n / 2], const Tile& tile, int block,
                                           const Store& store) {
  int lane = threadIdx.x % kWarp, column = column_of(tile.block + block) + lane / 4 * 4;
#pragma unroll
  for (int r = 0; r < n / 4; ++r) {
    int row = r / 2 * kStep + lane % 4 * 2 + r % 2, at = r / 2 * 4 + r % 2;
    if (row < tile.rows) store(tile.row + row, column, sums[at], sums[at + 2]);
  }
}

template <int n, class Store>
__device__ __forceinline__ void multiply_tile(Ring& ring, const Tile& tile, const Operands& of,
                                              const Store& store) {
  int block = threadIdx.x / kWarp - kCopyingWarps;
  float sums[n / 2] = {};
  sum_stages<n>(sums, ring, of, Places<n>(tile, of, block));
  if (tile.block + block < of.width / kBlock) store_sums<n>(sums, tile, block, store);
}

template <class Store>
__device__ __forceinline__ void multiply_tiles(Ring ring, const Operands& of, const Store& store) {
  if (!of.are_known) wait_for_previous();
  int index = blockIdx.x, tiles = tiles_of(of);
  Tile tile = uniform(tile_at(index, tiles, of));
  wait_for_previous();
  while (tile.rows >= 0) {
    Tile next = tile_at(index += gridDim.x, tiles, of);
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
      barrier_init(read_by + i, of.blocks);
    }
    fence_stores();
  }
  __syncthreads();
  // In registers: a shared array's address would be computed at each use, from a register that is slow to read.
  Ring ring{uniform(reinterpret_cast<char*>(shared)), uniform(filled), uniform(read_by), stages,
            stage_bytes};
  if (threadIdx.x < kWarp * kCopyingWarps) copy_tiles<Store::kIsGated>(ring, of);
  else multiply_tiles(ring, of, store);
}

// out_mn = A @ W.T + bias_n (null for none), as `Stored`
#define LINEAR(name, Stored)                                                                     \
  extern "C" __global__ void __launch_bounds__(kMostThreads)                                     \
      name(const HALF* a, const int* source, const HALF* w_gpsrk, const float* bias_n,           \
           Stored* out_mn, const int4* tiles, const int* tile_count, int are_known, int most,    \
           int m, int extent, int steps, int width, int n, int blocks, int is_alone, int stages, \
           int stage_bytes) {                                                                    \
    compute({a, source, w_gpsrk, tiles, tile_count, are_known, most, m, extent, steps, width,    \
             blocks, is_alone},                                                                  \
            stages, stage_bytes, LinearPair<Stored>{bias_n, out_mn, n});                         \
  }
LINEAR(linear_few_mma, F32)
LINEAR(linear_rounded_few_mma, HALF)

// out = silu(A @ w1.T) * (A @ w3.T) * GATED_SCALE, n channels in slabs of `out_extent` rows, where the
// rows of W are one of w1, one of w3, and so on
extern "C" __global__ void __launch_bounds__(kMostThreads)
    gated_few_mma(const HALF* a, const int* source, const HALF* w_gpsrk, HALF* out,
                  const int4* tiles, const int* tile_count, int are_known, int most, int m,
                  int extent, int steps, int width, int n, int blocks, int is_alone, int stages,
                  int stage_bytes, int out_extent) {
  compute({a, source, w_gpsrk, tiles, tile_count, are_known, most, m, extent, steps, width, blocks,
           is_alone},
          stages, stage_bytes, GatedPair{out, n, out_extent});
}
