// out = A @ W in float32, one fused multiply-add per term.  The terms of an output element are
// kGroups chains, each over its own range of k, added to +0 in their order (chains.py): the same
// whatever the tile.  So its bits depend neither on the batch nor on the heights of tiles, and are
// those of cpu_simd.
//
//   a_panels  a panel for each tile of rows, made by `arrange` in panels.cu (panels.cuh)
//   w_gpkc    matrices packed by `transpose` in packing.cu: groups, panels of 128 columns (padded
//             with zeros), k, columns
//   tiles     (group, first row, rows, the first of the group's tiles of this height | their
//             number << 16), the highest first; without a list, `dense_tiles` of group 0
//             (even_tiles.cuh)
//
// A CTA has an SM to itself, and all of it works on one tile of 16 to 48 rows x 128 columns: two warps
// for each range of k, side by side, a thread summing 4 to 12 rows x 8 columns.
// Tiles are small, and there are many: with few rows, what counts is that all SMs are busy
// to the end.  CTAs go from tile to tile, and the copies of the next one's first stages run
// while the sums of this one are added and stored.
//
// There is a loop for each height of tiles, and all sum in the same registers: with sums of their
// own the compiler allots registers worse.
//
// A scheduler starts one multiplication per cycle only if two of its operands come from different
// banks of registers and the third is kept from the one before.  Hence the multiplications go
// forth and back over the columns; hence too that four sums are stored as (1, 0, 3, 2): as they are, they
// would have to lie in the banks of the weights that they meet.
#include "even_tiles.cuh"
#include "panels.cuh"
#include "shared_memory.cuh"
#include "silu.cuh"
#include "stages.cuh"

constexpr int kRows = kTallest / 4, kLeastRows = kLowest / 4, kRowsStep = kHeightStep / 4;
constexpr int kTileK = TILE_K, kGroups = GROUPS;  // k of a stage
constexpr int kWarps = STAGES;                    // of a group: each fills a stage
constexpr int kGroupThreads = 32 * kWarps, kThreads = kGroups * kGroupThreads;
constexpr int kColumns = 8, kTileN = kWarps * 64;
static_assert(kTileN == WIDTH, "a warp multiplies 64 columns");
constexpr int kPass = PASS;              // rows of a thread whose sums are added at once
constexpr int kPassRow = kTileN + 4;     // in floats: puts rows in different banks
constexpr int kStageW = kTileK * kTileN;

using Ring = Stages<kStageW, kTileK * kTallest, kGroupThreads>;
constexpr int kRound = Ring::kCount * kTileK;  // in k
static_assert(STEP % kRound == 0, "all k are in whole rounds");
constexpr int kRings = kGroups * Ring::kCount * Ring::kFloats;

extern __shared__ __align__(128) float shared[];  // the rings' stages, then sums

struct Tile {
  int group, row, rows, column, panel;

  __device__ __forceinline__ int height() const { return height_of(rows); }
};

// What a thread multiplies for one k; 4 x 8 threads per warp.  Its rows are four in a row of every
// sixteen, but the last two of ten or six are two in a row of eight.
struct Fragment {
  float a[kRows], w[kColumns];
};

// Where a thread's part of the first stage begins.
struct Lane {
  u32 w, a, last_two;

  __device__ __forceinline__ explicit Lane(u32 stage) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % kWarps;
    w = stage + 4 * (warp * 64 + lane % 8 * 4);
    a = stage + 4 * (kStageW + lane / 8 * 4);
    last_two = a - lane / 8 * 8;
    asm volatile("" : "+r"(w), "+r"(a), "+r"(last_two));  // or they are computed in every stage
  }
};

// The fragment of the stage's `k`, in a tile of which a thread has kCount rows.
template <int kCount>
__device__ __forceinline__ void read(Fragment& fragment, const Lane& lane, int stage, int k) {
  int at = stage * Ring::kBytes, w = at + 4 * k * kTileN, a = at + 4 * k * 4 * kCount;
#pragma unroll
  for (int i = 0; i + 4 <= kCount; i += 4) read_four(fragment.a + i, lane.a + a + 16 * i);
  if constexpr (kCount % 4 == 2)
    read_two(fragment.a + kCount - 2, lane.last_two + a + 16 * (kCount - 2));
#pragma unroll
  for (int i = 0; i < kColumns; i += 4) read_four(fragment.w + i, lane.w + w + 32 * i);
}

template <int kCount>
__device__ __forceinline__ void multiply(const Fragment& fragment, float (&acc)[kRows][kColumns]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i)
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      int n = i % 2 ? kColumns - 1 - j : j;
      acc[i][n] = fmaf(fragment.a[i], fragment.w[n], acc[i][n]);
    }
}

// Sums this group's `rounds` rounds of stages in the first kCount rows of `acc`; the next k's
// fragment is read while this one's is multiplied.
template <int kCount>
__device__ __forceinline__ void run(Ring& ring, const Lane& lane, int rounds,
                                    float (&acc)[kRows][kColumns]) {
  // With both stages unrolled all addresses are constants; but a loop of more than some 32 KB, as
  // those for 32 rows and more would be, does not fit the cache of instructions.
  constexpr int kUnrolled = kCount <= 6 ? Ring::kCount : 1;
  Fragment fragments[2];
  if (rounds > 0) {
    ring.wait(0);
    read<kCount>(fragments[0], lane, 0, 0);
  }
#pragma unroll 1
  for (int left = rounds; left > 0; --left)
#pragma unroll kUnrolled
    for (int stage = 0; stage < Ring::kCount; ++stage) {
      int next = (stage + 1) % Ring::kCount;
      bool is_end = next == 0 && left == 1;
      if (next == 0) ring.go_round();
#pragma unroll
      for (int k = 0; k < kTileK - 1; ++k) {
        if (k == 1 && !is_end) ring.refill(next, kTileK * 4 * kCount);
        read<kCount>(fragments[(k + 1) % 2], lane, stage, k + 1);
        multiply<kCount>(fragments[k % 2], acc);
      }
      if (!is_end) {
        ring.wait(next);
        read<kCount>(fragments[0], lane, next, 0);
      }
      ring.release(stage);
      multiply<kCount>(fragments[1], acc);
    }
}

// Sums with the loop for the height of a tile with `rows` rows.
template <int kMost = kRows>
__device__ __forceinline__ void run_as_high(Ring& ring, const Lane& lane, int rounds, int rows,
                                            float (&acc)[kRows][kColumns]) {
  constexpr int kLess = kMost - kRowsStep;
  if constexpr (kMost > kLeastRows)
    if (rows <= 4 * kLess) return run_as_high<kLess>(ring, lane, rounds, rows, acc);
  run<kMost>(ring, lane, rounds, acc);
}

__device__ __forceinline__ float4 total(const float* from, int pass_rows) {
  float4 sum = {};
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    float4 v = *reinterpret_cast<const float4*>(from + group * pass_rows * kPassRow);
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
  }
  return make_float4(sum.y, sum.x, sum.w, sum.z);
}

// The row in the tile of row `i` of the `count` that the threads `at` of 4 have; -1: it is not there.
__device__ __forceinline__ int row_in_tile(int at, int i, int count) {
  int in_four = i % 4, first = i - in_four, left = count - first;  // rows of a thread from there
  if (left >= 4) return 4 * first + 4 * at + in_four;
  return in_four < left ? 4 * first + 2 * at + in_four : -1;
}

// Adds the groups' sums, kPass rows of each thread at a time, and has them stored.
template <class Epilogue>
__device__ __forceinline__ void reduce(const float (&acc)[kRows][kColumns], const Tile& tile) {
  constexpr int kPairs = kTileN / 8, kPassRows = 4 * kPass;
  constexpr bool kDown = Epilogue::kDown;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % kWarps;
  int group = threadIdx.x / kGroupThreads, count = tile.height() / 4;
  float *sums = shared + kRings,
        *mine = sums + (group * kPassRows + lane / 8 * kPass) * kPassRow + warp * 64 + lane % 8 * 4;
#pragma unroll
  for (int i0 = 0; i0 < kRows; i0 += kPass) {
    if (i0 >= count) break;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kPass && i0 + i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; j += 4) {
        const float* v = acc[i0 + i] + j;
        *reinterpret_cast<float4*>(mine + i * kPassRow + 8 * j) =
            make_float4(v[1], v[0], v[3], v[2]);
      }
    __syncthreads();
    for (int q = threadIdx.x; q < kPassRows * kPairs; q += kThreads) {
      int r = kDown ? q % kPassRows : q / kPairs, pair = kDown ? q / kPassRows : q % kPairs;
      int row = row_in_tile(r / kPass, i0 + r % kPass, count);
      if (row < 0) continue;
      int column = pair / 8 * 64 + pair % 8 * 4;
      const float* from = sums + r * kPassRow + column;
      Epilogue::store(tile, row, column, total(from, kPassRows), total(from + 32, kPassRows));
    }
  }
}

// What a kernel multiplies, and where the results go.
struct Operands {
  const float *a_panels, *w_gpkc, *bias_n;
  float* out;
  const int4* tiles;
  const int* tile_count;
  EvenTiles even;
  int k, width, n;

  __device__ int count() const { return tiles ? *tile_count : even.count; }

  // The tile of a unit.  CTAs take units in their order: the tiles of one group that have the same
  // height and share a panel of W follow each other.
  __device__ Tile tile(int unit) const {
    int columns = width / kTileN, first, many;
    if (tiles) {
      int range = tiles[unit / columns].w;
      first = range & 0xffff, many = range >> 16;
    } else {
      bool is_low = unit >= even.tall * columns;
      first = is_low ? even.tall : 0, many = is_low ? even.count - even.tall : even.tall;
    }
    int in_range = unit - first * columns, panel = first + in_range % many;
    int column = in_range / many * kTileN;
    if (!tiles) return {0, even.first_row(panel), even.rows_of(panel), column, panel};
    int4 listed = tiles[panel];
    return {listed.x, listed.y, listed.z, column, panel};
  }

  // The rounds in a group's range of k: whole steps, so that all chips add in the same order.
  __device__ int first_round(int group) const {
    return k / STEP * group / kGroups * (STEP / kRound);
  }
  __device__ int rounds(int group) const { return first_round(group + 1) - first_round(group); }

  __device__ Ring::Source source(const Tile& tile, int group) const {
    size_t from = first_round(group) * kRound;
    const float* w_kc = w_gpkc + (size_t(tile.group) * width + tile.column) * k;
    const float* a_kr = a_panels + size_t(tile.panel) * kTallest * k;
    return {w_kc + from * kTileN, a_kr + from * tile.height()};
  }
};

// What the threads of a CTA have in common, besides stages and sums.
__shared__ struct {
  Operands operands;
  int units;
  Tile tiles[2];  // at work on, and next
  Ring::Shared rings[kGroups];
} cta;

// Starts the copies of a tile, and leaves in `to` which it is.
__device__ __forceinline__ void start(Ring& ring, int unit, Tile& to) {
  Tile tile = cta.operands.tile(unit);
  if (threadIdx.x == 0) to = tile;
  int group = uniform(threadIdx.x / kGroupThreads);
  if (cta.operands.rounds(group) > 0)
    ring.start(cta.operands.source(tile, group), uniform(kTileK * tile.height()));
}

// Computes the tile that was started, and starts the next one.
template <class Epilogue>
__device__ __forceinline__ void compute_tile(Ring& ring, const Lane& lane, int turn, int next) {
  float acc[kRows][kColumns] = {};
  int rounds = cta.operands.rounds(uniform(threadIdx.x / kGroupThreads));
  run_as_high(ring, lane, rounds, uniform(cta.tiles[turn].rows), acc);
  if (next < cta.units) start(ring, next, cta.tiles[turn ^ 1]);
  Tile tile = cta.tiles[turn];  // a copy: others may have gone on to the tile after the next
  reduce<Epilogue>(acc, tile);
}

template <class Epilogue>
__device__ __forceinline__ void compute(const Operands& operands) {
  if (threadIdx.x == 0) {
    cta.operands = operands;
    cta.units = operands.count() * (operands.width / kTileN);
  }
  Ring::prepare(cta.rings);
  __syncthreads();
  Ring ring(shared, cta.rings);
  Lane lane(ring.address());
  if (blockIdx.x < cta.units) start(ring, blockIdx.x, cta.tiles[0]);
  __syncthreads();
#pragma unroll 1
  for (int unit = blockIdx.x, turn = 0; unit < cta.units; unit += gridDim.x, turn ^= 1)
    compute_tile<Epilogue>(ring, lane, turn, unit + gridDim.x);
}

// out_mn = A @ W + bias_n (null for none)
struct Linear {
  static constexpr bool kDown = false;  // neighbouring threads have neighbouring columns

  // A row and a column of the tile, and two fours, the second 32 columns to the right.
  static __device__ __forceinline__ void store(const Tile& tile, int row, int column, float4 first,
                                               float4 second) {
    if (row >= tile.rows) return;
    int n = cta.operands.n, c = tile.column + column;
    float* out_n = cta.operands.out + size_t(tile.row + row) * n;
    store_four(out_n, c, n, first);
    store_four(out_n, c + 32, n, second);
  }

  static __device__ __forceinline__ void store_four(float* out_n, int column, int n, float4 v) {
    const float* bias_n = cta.operands.bias_n;
    if (n % 4 == 0 && column < n) {
      float4 bias = bias_n ? *reinterpret_cast<const float4*>(bias_n + column) : float4{};
      *reinterpret_cast<float4*>(out_n + column) =
          make_float4(v.x + bias.x, v.y + bias.y, v.z + bias.z, v.w + bias.w);
      return;
    }
    const float values[] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (column + i < n) out_n[column + i] = values[i] + (bias_n ? bias_n[column + i] : 0);
  }
};

// silu(A @ w1) * (A @ w3), in panels of the same tiles, whose k are the first n columns; W has 32
// columns of w1, then 32 of w3, and so on.
struct Gated {
  static_assert(RUN == 32, "`store` gets a four of w1 and, 32 columns to the right, one of w3");
  static constexpr bool kDown = true;  // neighbouring threads have neighbouring rows

  static __device__ __forceinline__ void store(const Tile& tile, int row, int column, float4 gate,
                                               float4 up) {
    int n = cta.operands.n;
    int c = (tile.column + column) / 64 * 32 + column % 64;
    int height = tile.height();
    float* out = cta.operands.out + size_t(tile.panel) * n * kTallest + size_t(c) * height + row;
    const float gates[] = {gate.x, gate.y, gate.z, gate.w}, ups[] = {up.x, up.y, up.z, up.w};
    // Not `/`, whose rare cases are a call: with one in it, the whole kernel takes half as long again.
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (c + i < n) out[i * height] = silu(gates[i]) * ups[i];
  }
};

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    linear_simt(const float* a_panels, const float* w_gpkc, const float* bias_n, float* out_mn,
                const int4* tiles, const int* tile_count, int m, int dense_tiles, int k, int width,
                int n) {
  EvenTiles even = even_tiles(m, dense_tiles, kHeightStep);
  compute<Linear>({a_panels, w_gpkc, bias_n, out_mn, tiles, tile_count, even, k, width, n});
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    gated_simt(const float* a_panels, const float* w_gpkc, float* out_panels, const int4* tiles,
               const int* tile_count, int m, int dense_tiles, int k, int width, int n) {
  EvenTiles even = even_tiles(m, dense_tiles, kHeightStep);
  compute<Gated>({a_panels, w_gpkc, nullptr, out_panels, tiles, tile_count, even, k, width, n});
}
