// out = A @ W in float32 for tiles of few rows: the sums of gemm.cu, with their chains, order and bits
// (chains.py).  Few rows take as long as reading W does, so what counts is that many bytes are on
// their way all the time.
//
//   a          rows of activations, `extent` elements apart
//   source     the row of `a` that each row of a tile is; null: its own
//   w_gpkc     matrices packed by `transpose` in packing.cu: groups, panels of 128 columns (padded
//              with zeros), k, columns
//   tiles      (group, first row, rows, -) of up to kMostRows rows; without a list, all m rows, group 0
//
// A CTA makes kColumns columns of one tile, and a thread sums a range of k of one column.  Warps do
// not wait for each other before the end: each copies what it multiplies, through stages of its own.
// If it is known before the kernel ahead has ended which W that is, the copies begin by then.
#include "async_copy.cuh"
#include "dependent.cuh"
#include "silu.cuh"

constexpr int kMostRows = MOST_ROWS, kStageK = STAGE_K, kStages = STAGES, kVector = VECTOR;
constexpr int kGroups = GROUPS, kPanel = WIDTH, kColumns = COLUMNS;
constexpr int kThreads = kGroups * kColumns, kWarps = kThreads / 32;
constexpr int kRanges = 32 / kColumns;              // of k, that a warp has
constexpr int kRangeA = kMostRows * kStageK + 4;    // floats; puts two ranges in different banks
constexpr int kStageW = kStageK * 32, kStage = kStageW + kRanges * kRangeA;
static_assert(kColumns == 16 || kColumns == 32, "a warp has one range of k, or two");
static_assert(STEP % kStageK == 0 && kStageK == 8, "ranges are whole stages, of two vectors of a row");

extern __shared__ __align__(128) float shared[];  // the warps' stages, then sums

struct Operands {
  const float* a;
  const int* source;
  const float *w_gpkc, *bias_n;
  float* out;
  const int4* tiles;
  const int* tile_count;
  int m, inputs, extent, k, width, n;
};

struct Tile {
  int group, row, rows;
};

// The columns of a CTA.  A gated product has as many of w1 as of w3, which are RUN to the right.
template <bool kIsGated>
__device__ __forceinline__ int column_of(int i) {
  if constexpr (!kIsGated) return blockIdx.x * kColumns + i;
  constexpr int kHalf = kColumns / 2, kUnits = RUN / kHalf;
  int first = blockIdx.x / kUnits * 2 * RUN + blockIdx.x % kUnits * kHalf;
  return first + (i < kHalf ? i : RUN + i - kHalf);
}

// Where a range of k begins: ranges are whole steps, so that all chips add in the same order.
__device__ __forceinline__ int begin_of(int range, int k) { return k / STEP * range / kGroups * STEP; }

__device__ __forceinline__ int length_of(int range, int k) {
  return begin_of(range + 1, k) - begin_of(range, k);
}

// What a thread copies into stages, and what it multiplies.
template <bool kIsGated>
struct Lane {
  static constexpr int kCopies = kStageK / kVector;  // of a row, into a stage
  static constexpr int kParts = (kRanges * kMostRows * kCopies + 31) / 32;

  // What goes to one place of every stage: from `end` on nothing, and zeros instead of what is not there.
  struct Part {
    const float* from;
    int to, k, end;
  };

  float* stages;  // of the warp
  const float* w;
  Part parts[kParts];
  int copied, multiplied;  // k of the range of which it copies W, and of the one that it sums
  int count;               // stages of the warp's longest range

  __device__ __forceinline__ explicit Lane(const Operands& with) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = warp * kRanges;
    int place = lane % 8 * 4, column = column_of<kIsGated>(place % kColumns);
    int range = first + place / kColumns;
    stages = shared + warp * kStages * kStage;
    w = with.w_gpkc + column % kPanel +
        (size_t(column / kPanel) * with.k + begin_of(range, with.k) + lane / 8) * kPanel;
    copied = length_of(range, with.k), multiplied = length_of(first + lane / kColumns, with.k);
    count = max(length_of(first, with.k), length_of(first + kRanges - 1, with.k)) / kStageK;
  }

  __device__ __forceinline__ void find_rows(const Operands& with, const Tile& tile) {
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      int q = threadIdx.x % 32 + 32 * i, part = q % kCopies * kVector;
      int row = q / kCopies % kMostRows, of_warp = q / kCopies / kMostRows;
      int range = threadIdx.x / 32 * kRanges + of_warp, begin = begin_of(range, with.k) + part;
      parts[i] = {nullptr, kStageW + of_warp * kRangeA + row * kStageK + part, begin, 0};
      if (of_warp >= kRanges || row >= tile.rows) continue;
      int from = with.source ? with.source[tile.row + row] : tile.row + row;
      parts[i].from = with.a + size_t(from) * with.extent + begin;
      parts[i].end = begin_of(range + 1, with.k);
    }
  }

  __device__ __forceinline__ float* stage(int i) const { return stages + i % kStages * kStage; }

  // Starts the copies of W for a stage: 8 k of 32 floats, of one range or of two side by side.
  __device__ __forceinline__ void copy_w(int i) const {
    if (i * kStageK >= copied) return;
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < kStageK; k += 4)
      copy_async<16>(stage(i) + (k + lane / 8) * 32 + lane % 8 * 4,
                     w + size_t(i * kStageK + k) * kPanel, 16);
  }

  __device__ __forceinline__ void copy_a(int inputs, int i) const {
#pragma unroll
    for (const Part& part : parts) {
      int k = part.k + i * kStageK;
      if (k < part.end)
        copy_async<4 * kVector>(stage(i) + part.to, part.from + i * kStageK,
                                k < inputs ? 4 * kVector : 0);
    }
  }
};

// Multiplies a stage: kRows rows of a thread's range, whatever rows there are.
template <int kRows>
__device__ __forceinline__ void multiply(const float* stage, float (&acc)[kRows]) {
  int lane = threadIdx.x % 32;
  const float *w = stage + lane, *a = stage + kStageW + lane / kColumns * kRangeA;
#pragma unroll
  for (int k = 0; k < kStageK; k += 4) {
    float4 of_a[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row)
      of_a[row] = *reinterpret_cast<const float4*>(a + row * kStageK + k);
    float of_w[] = {w[k * 32], w[k * 32 + 32], w[k * 32 + 64], w[k * 32 + 96]};
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      acc[row] = fmaf(of_a[row].x, of_w[0], acc[row]);
      acc[row] = fmaf(of_a[row].y, of_w[1], acc[row]);
      acc[row] = fmaf(of_a[row].z, of_w[2], acc[row]);
      acc[row] = fmaf(of_a[row].w, of_w[3], acc[row]);
    }
  }
}

// Adds the ranges' sums to +0, in the order of k.
__device__ __forceinline__ float total(const float* sums, int rows, int row, int i) {
  float sum = 0.0f;
#pragma unroll
  for (int range = 0; range < kGroups; ++range) sum += sums[(range * rows + row) * kColumns + i];
  return sum;
}

// out_mn = A @ W + bias_n (null for none)
struct Linear {
  static constexpr bool kIsGated = false;

  static __device__ __forceinline__ void store(const Operands& with, const Tile& tile,
                                               const float* sums, int rows) {
    for (int q = threadIdx.x; q < tile.rows * kColumns; q += kThreads) {
      int row = q / kColumns, i = q % kColumns, column = column_of<false>(i);
      if (column >= with.n) continue;
      float bias = with.bias_n ? with.bias_n[column] : 0.0f;
      with.out[size_t(tile.row + row) * with.n + column] = total(sums, rows, row, i) + bias;
    }
  }
};

// out_mn = silu(A @ w1) * (A @ w3); W has 32 columns of w1, then 32 of w3, and so on.
struct Gated {
  static constexpr bool kIsGated = true;

  static __device__ __forceinline__ void store(const Operands& with, const Tile& tile,
                                               const float* sums, int rows) {
    constexpr int kHalf = kColumns / 2;
    for (int q = threadIdx.x; q < tile.rows * kHalf; q += kThreads) {
      int row = q / kHalf, i = q % kHalf, packed = column_of<true>(i);
      int column = packed / (2 * RUN) * RUN + packed % (2 * RUN);
      if (column >= with.n) continue;
      float gate = total(sums, rows, row, i), up = total(sums, rows, row, kHalf + i);
      with.out[size_t(tile.row + row) * with.n + column] = silu(gate) * up;
    }
  }
};

// Computes a tile of up to kRows rows, whose first stages of W are on their way.
template <class Epilogue, int kRows>
__device__ __forceinline__ void compute(const Operands& with, const Tile& tile,
                                        const Lane<Epilogue::kIsGated>& lane) {
  for (int i = 0; i < kStages; ++i) {
    lane.copy_a(with.inputs, i);
    commit_copies();
  }
  float acc[kRows] = {};
#pragma unroll 1
  for (int i = 0; i < lane.count; ++i) {
    wait_copies<kStages - 1>();
    __syncwarp();
    if (i * kStageK < lane.multiplied) multiply<kRows>(lane.stage(i), acc);
    __syncwarp();
    lane.copy_w(i + kStages), lane.copy_a(with.inputs, i + kStages);
    commit_copies();
  }
  let_next_start();
  float* sums = shared + kWarps * kStages * kStage;
  int range = threadIdx.x / kColumns, column = threadIdx.x % kColumns;
#pragma unroll
  for (int row = 0; row < kRows; ++row) sums[(range * kRows + row) * kColumns + column] = acc[row];
  __syncthreads();
  Epilogue::store(with, tile, sums, kRows);
}

template <class Epilogue>
__device__ __forceinline__ void compute(const Operands& with) {
  Lane<Epilogue::kIsGated> lane(with);
  Tile tile{0, 0, with.m};
  if (with.tiles) {
    wait_for_previous();
    if (int(blockIdx.y) >= *with.tile_count) return;
    int4 listed = with.tiles[blockIdx.y];
    tile = {listed.x, listed.y, listed.z};
    lane.w += size_t(tile.group) * with.width * with.k;
  }
  for (int i = 0; i < kStages; ++i) lane.copy_w(i);
  if (!with.tiles) wait_for_previous();
  lane.find_rows(with, tile);
  if (tile.rows <= 1) compute<Epilogue, 1>(with, tile, lane);
  else if (tile.rows <= 2) compute<Epilogue, 2>(with, tile, lane);
  else if (tile.rows <= 4) compute<Epilogue, 4>(with, tile, lane);
  else compute<Epilogue, kMostRows>(with, tile, lane);
}

extern "C" __global__ void __launch_bounds__(kThreads)
    linear_few(const float* a, const int* source, const float* w_gpkc, const float* bias_n,
               float* out_mn, const int4* tiles, const int* tile_count, int m, int inputs,
               int extent, int k, int width, int n) {
  compute<Linear>({a, source, w_gpkc, bias_n, out_mn, tiles, tile_count, m, inputs, extent, k,
                   width, n});
}

extern "C" __global__ void __launch_bounds__(kThreads)
    gated_few(const float* a, const int* source, const float* w_gpkc, float* out_mn,
              const int4* tiles, const int* tile_count, int m, int inputs, int extent, int k,
              int width, int n) {
  compute<Gated>({a, source, w_gpkc, nullptr, out_mn, tiles, tile_count, m, inputs, extent, k,
                  width, n});
}
