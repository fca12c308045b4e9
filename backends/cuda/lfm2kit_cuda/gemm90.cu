// out = A @ W.T on Hopper's tensor cores (wgmma): operands in 16 bits, sums in float32, in steps of
// 16 over k, from 0 on, whatever the tile: equal bits in every batch.  HALF is BF16 or F16.  With
// TERMS == 3 an activation is the exact sum of three BF16 numbers, and all are multiplied by the
// same stage of weights.
//
//   a         rows of activations in slabs (slabs.cuh), first those of one term, then of the next
//   w_gpsrk   matrices packed by `panel` in packing.cu: [groups][width / 256][steps][256][64]
//   tiles     (group, first row, rows, the group's first tile | its tiles << 16); without a list,
//             rows in steps of tile_rows, group 0
//
// Weights are the instruction's rows of 64 and activations its n, so that n follows the rows of an
// expert.  There is a CTA for each SM, and CTA i takes the tiles i, i + the number of CTAs, and so
// on.  In a CTA one thread copies stages of 64 k, and two warpgroups multiply, each 128 columns by all rows of the tile, or, if the
// tile has only 128 columns, by half of them.  A tile's copies begin while the tile before it is being stored.
//
// Both operands lie in memory as they are to lie in a stage, with k inside, 64 elements in a row of
// 128 bytes, swizzled: what a stage needs of each are consecutive bytes.
#include "dependent.cuh"
#include "epilogue90.cuh"
#include "ring.cuh"
#include "slabs.cuh"
#include "uniform.cuh"
#include "wgmma.cuh"

constexpr int kTileK = kSlabK, kRowBytes = kTileK * 2;
constexpr int kPanel = PANEL, kHalf = kPanel / 2;    // columns of a panel, of a warpgroup
constexpr int kGroup = 128, kThreads = 3 * kGroup;  // threads of a warpgroup, of a CTA
static_assert(PANEL == 256 && THREADS == kThreads, "two warpgroups multiply 128 columns each");
constexpr int kStep = STEP, kStoredRows = 16;          // a warpgroup's rows are a multiple of kStep
// The rows that a warpgroup multiplies at most.
constexpr int kMostOfWarpgroup = TERMS == 1 ? MOST_ROWS : MOST_ROWS_OF_TERMS;
// Registers of a thread; together they are no more than a CTA begins with.
constexpr int kCopyRegisters = 24, kMultiplyRegisters = 240;
static_assert(kCopyRegisters + 2 * kMultiplyRegisters <= 3 * 168, "else the CTA waits for ever");

struct Operands {
  const HALF* a;
  const HALF* w_gpsrk;
  const int4* tiles;
  const int* tile_count;
  int tile_rows, tile_columns;
  int m, extent, steps, width;  // rows of activations, and of a slab; stages in all of k
  int term_rows;                // rows of a stage that each term of the activations may take
};

struct Tile {
  int group, row, rows, column;  // rows < 0: there is none
};

// The tiles of a group follow each other for each range of columns, so that its weights are read from
// memory once.  Each range begins with another tile of the group: tiles differ in their rows, and a CTA
// that takes every 132nd one should not always get the same kind.
__device__ inline Tile tile_at(int index, const Operands& of) {
  int ranges = of.width / of.tile_columns;
  if (!of.tiles) {
    int count = (of.m + of.tile_rows - 1) / of.tile_rows, row = index % count * of.tile_rows;
    if (index >= count * ranges) return Tile{0, 0, -1, 0};
    return Tile{0, row, min(of.tile_rows, of.m - row), index / count * of.tile_columns};
  }
  if (index >= *of.tile_count * ranges) return Tile{0, 0, -1, 0};
  int siblings = of.tiles[index / ranges].w, first = siblings & 0xffff, count = siblings >> 16;
  int turn = index - first * ranges;
  int4 listed = of.tiles[first + (turn + turn / count + first) % count];
  return Tile{listed.x, listed.y, listed.z, turn / count * of.tile_columns};
}

__device__ inline Tile uniform(const Tile& tile) {
  return {uniform(tile.group), uniform(tile.row), uniform(tile.rows), uniform(tile.column)};
}

// The rows of a tile that a warpgroup multiplies, with padding.
__device__ inline int rows_each(const Tile& tile, int tile_columns) {
  int rows = tile_columns == kPanel ? tile.rows : (tile.rows + 1) / 2;
  return (rows + kStep - 1) / kStep * kStep;
}

// Starts the copy of a tile's weights, step s, to the ring's stage.
__device__ inline void copy_weights(const Ring& ring, const Tile& tile, int s, const Operands& of) {
  int panels = of.width / kPanel, bytes = of.tile_columns * kRowBytes;
  size_t panel = size_t(tile.group) * panels + tile.column / kPanel;
  size_t row = (panel * of.steps + s) * kPanel + tile.column % kPanel;
  u64* filled = ring.filled + ring.stage;
  barrier_promise(filled, bytes);
  const char* weights = reinterpret_cast<const char*>(of.w_gpsrk) + row * kRowBytes;
  copy_bulk(ring.at(), weights, bytes, filled);
}

// Copies the first weights of a dense layer, which may be read before the kernel ahead of this one has ended:
// they were packed at load, at least one kernel before it.  Returns the number of stages that it copies.
__device__ inline int copy_first_weights(Ring ring, const Operands& of) {
  if (of.tiles) return 0;
  int stages = min(ring.count, of.steps);
  Tile tile = tile_at(blockIdx.x, of);
  for (int s = 0; s < stages; ++s, ring.next()) copy_weights(ring, tile, s, of);
  return stages;
}

// Starts the copy of a tile's activations, step s, to the ring's stage; rows beyond the last are
// whatever lay there, and their sums are not stored.
__device__ inline void copy_activations(const Ring& ring, const Tile& tile, int s,
                                        const Operands& of) {
  int rows = rows_each(tile, of.tile_columns) * (kPanel / of.tile_columns);
  int bytes = min(rows, of.extent - tile.row) * kRowBytes;
  u64* filled = ring.filled + ring.stage;
  barrier_promise(filled, TERMS * bytes);
#pragma unroll
  for (int term = 0; term < TERMS; ++term) {
    size_t row = (size_t(term) * of.steps + s) * of.extent + tile.row;
    copy_bulk(ring.at() + (of.tile_columns + term * of.term_rows) * kRowBytes,
                 reinterpret_cast<const char*>(of.a) + row * kRowBytes, bytes, filled);
  }
}

// Fills the ring's stages with the operands of this CTA's tiles.
__device__ __forceinline__ void copy_tiles(Ring ring, const Operands& of) {
  int ahead = copy_first_weights(ring, of);
  wait_for_previous();
  for (int index = blockIdx.x;; index += gridDim.x, ahead = 0) {
    Tile tile = tile_at(index, of);
    if (tile.rows < 0) break;
    for (int s = 0; s < of.steps; ++s, ring.next()) {
      ring.wait_until_read();
      if (s >= ahead) copy_weights(ring, tile, s, of);
      copy_activations(ring, tile, s, of);
      barrier_arrive(ring.filled + ring.stage);
    }
  }
  let_next_start();
}

// Gives a stage of the ring (-1: none) back to the thread that copies.
__device__ inline void release(const Ring& ring, int stage) {
  if (stage >= 0 && threadIdx.x % 32 == 0) barrier_arrive(ring.read + stage);
}

// What a thread sums: 2 x 64 columns by the rows of its warpgroup, as Wgmma holds them.  All numbers
// of rows use the same registers, from the first on.
typedef float Sums[2][kMostOfWarpgroup / 2];

// sums = the products of all stages, of which W begins at w_at, A at a_at.
template <int n>
__device__ __forceinline__ void sum_stages(Sums& sums, Ring& ring, int steps, int w_at, int a_at) {
  int last = -1;  // the stage that was read last
  for (int s = 0; s < steps; ++s, ring.next()) {
    ring.wait_until_filled();
    u64 w = matrix_descriptor(shared_address(ring.at()) + w_at);
    u64 a = matrix_descriptor(shared_address(ring.at()) + a_at);
    wgmma_begin();
#pragma unroll
    for (int step = 0; step < kTileK / 16; ++step)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        Wgmma<n>::multiply(sums[half], w + half * 64 * kRowBytes / 16 + step * 2, a + step * 2,
                           step > 0 || s > 0);
    wgmma_commit();
    wgmma_wait<1>();
    release(ring, last);
    last = ring.stage;
  }
  wgmma_wait<0>();
  wgmma_end<n / 2>(sums[0]);
  wgmma_end<n / 2>(sums[1]);
  release(ring, last);
}

// Does the same with three terms.  The tensor cores' additions cut off what float32 does not hold, always
// towards zero; so a chain is one stage long, the smallest terms first, and chains are added as
// float32 does.  While one warpgroup adds, the other multiplies.
template <int n>
__device__ __forceinline__ void sum_terms(Sums& sums, Ring& ring, int steps, int w_at, int a_at,
                                          int term_rows) {
  float chain[n / 2];
#pragma unroll
  for (int i = 0; i < n / 2; ++i) sums[0][i] = sums[1][i] = 0;
  for (int s = 0; s < steps; ++s, ring.next()) {
    ring.wait_until_filled();
    u64 w = matrix_descriptor(shared_address(ring.at()) + w_at);
    u64 a = matrix_descriptor(shared_address(ring.at()) + a_at);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      wgmma_begin();
#pragma unroll
      for (int term = TERMS - 1; term >= 0; --term)
#pragma unroll
        for (int step = 0; step < kTileK / 16; ++step)
          Wgmma<n>::multiply(chain, w + half * 64 * kRowBytes / 16 + step * 2,
                             a + term * term_rows * kRowBytes / 16 + step * 2,
                             step > 0 || term < TERMS - 1);
      wgmma_commit();
      wgmma_wait<0>();
      wgmma_end<n / 2>(chain);
#pragma unroll
      for (int i = 0; i < n / 2; ++i) sums[half][i] += chain[i];
    }
    release(ring, ring.stage);
  }
}

// Sums this warpgroup's part of a tile.  The number of rows is a constant of the instruction, so there is
// a loop for each.
template <int n = kStep>
__device__ __forceinline__ void sum(Sums& sums, int rows, Ring& ring, const Operands& of) {
  if constexpr (n < kMostOfWarpgroup)
    if (rows > n) return sum<n + kStep>(sums, rows, ring, of);
  int warpgroup = uniform(threadIdx.x / kGroup) - 1;
  bool is_beside = of.tile_columns == kPanel;  // the other warpgroup's columns, else its rows
  int w_at = is_beside ? warpgroup * kHalf * kRowBytes : 0;
  int a_at = (of.tile_columns + (is_beside ? 0 : warpgroup * n)) * kRowBytes;
  if constexpr (TERMS == 1) sum_stages<n>(sums, ring, of.steps, w_at, a_at);
  else sum_terms<n>(sums, ring, of.steps, w_at, a_at, of.term_rows);
}

// Stores the rows before `end`, counted from this thread's first.  It first computes all results of
// kStoredRows rows, so that one does not wait for another.
template <bool are_whole, class Store>
__device__ __forceinline__ void store_rows(const Sums& sums, int rows, int end,
                                           const Store& store) {
#pragma unroll
  for (int first = 0; first < kMostOfWarpgroup; first += kStoredRows) {
    if (first >= rows) break;
    typename Store::Result results[kStoredRows / 4];
#pragma unroll
    for (int r = 0; r < kStoredRows / 4; ++r) {
      int i = first / 2 + r / 2 * 4 + r % 2;
      results[r] = store.result(sums[0][i], sums[0][i + 2], sums[1][i], sums[1][i + 2]);
    }
#pragma unroll
    for (int r = 0; r < kStoredRows / 4; ++r) {
      int at = first + r / 2 * 8 + r % 2;
      if (at < end) store.template put<are_whole>(at, results[r]);
    }
  }
}

template <class Store>
__device__ __forceinline__ void store_sums(const Sums& sums, int rows, const Tile& tile,
                                           const Operands& of, Store store) {
  int warpgroup = threadIdx.x / kGroup - 1, lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  bool is_beside = of.tile_columns == kPanel;
  int column = tile.column + (is_beside ? warpgroup * kHalf : 0) + warp * 32 + lane / 4 * 4;
  int first = is_beside ? 0 : warpgroup * rows, row = first + lane % 4 * 2;
  int end = min(tile.rows, first + rows) - row;
  if (!store.begin(tile.row + row, column)) return;
  if (store.are_whole()) store_rows<true>(sums, rows, end, store);
  else store_rows<false>(sums, rows, end, store);
}

template <class Store>
__device__ __forceinline__ void multiply_tiles(Ring ring, const Operands& of, Store store) {
  wait_for_previous();
  int index = blockIdx.x;
  Tile tile = uniform(tile_at(index, of));
  while (tile.rows >= 0) {
    Tile next = tile_at(index += gridDim.x, of);  // early: it takes two reads from memory
    int rows = rows_each(tile, of.tile_columns);
    Sums sums;
    sum(sums, rows, ring, of);
    store_sums(sums, rows, tile, of, store);
    tile = uniform(next);
  }
}

template <class Store>
__device__ __forceinline__ void compute(const Operands& of, int stages, int stage_bytes,
                                        Store store) {
  extern __shared__ __align__(1024) char shared[];
  __shared__ u64 filled[kMostStages], read[kMostStages];
  if (threadIdx.x == 0) {
    for (int i = 0; i < stages; ++i) {
      barrier_init(filled + i, 1);
      barrier_init(read + i, 2 * kGroup / 32);  // the multiplying warps
    }
    fence_stores();
  }
  __syncthreads();
  Ring ring{shared, filled, read, stages, stage_bytes};
  if (threadIdx.x < kGroup) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCopyRegisters));
    if (threadIdx.x == 0) copy_tiles(ring, of);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kMultiplyRegisters));
    multiply_tiles(ring, of, store);
  }
}

// out_mn = A @ W.T + bias_n (null for none), as `Stored`
#define LINEAR(name, Stored)                                                                      \
  extern "C" __global__ void __launch_bounds__(kThreads, 1)                                       \
      name(const HALF* a, const HALF* w_gpsrk, const float* bias_n, Stored* out_mn,               \
           const int4* tiles, const int* tile_count, int tile_rows, int tile_columns, int m,      \
           int extent, int steps, int width, int n, int stages, int stage_bytes, int term_rows) { \
    compute({a, w_gpsrk, tiles, tile_count, tile_rows, tile_columns, m, extent, steps, width,     \
             term_rows},                                                                          \
            stages, stage_bytes, Linear<Stored>(bias_n, out_mn, n));                              \
  }
LINEAR(linear_wgmma, F32)
#if TERMS == 1
LINEAR(linear_rounded_wgmma, HALF)
#endif

// out = silu(A @ w1.T) * (A @ w3.T), in slabs of the same extent, where the rows of W
// are one of w1, one of w3, and so on
extern "C" __global__ void __launch_bounds__(kThreads, 1)
    gated_wgmma(const HALF* a, const HALF* w_gpsrk, HALF* out, const int4* tiles,
                const int* tile_count, int tile_rows, int tile_columns, int m, int extent,
                int steps, int width, int n, int stages, int stage_bytes, int term_rows) {
  compute({a, w_gpsrk, tiles, tile_count, tile_rows, tile_columns, m, extent, steps, width,
           term_rows},
          stages, stage_bytes, Gated{out, n, extent});
}

