// out = A @ W in float32 for tiles of few rows: the sums of gemm.cu, with their chains, order and bits
// (chains.py).  Few rows take as long as reading W does, so what counts is that many bytes are on
// their way all the time, and that a stage takes few instructions.
//
//   a          rows of activations, of `inputs` elements
//   source     the row of `a` that each row of a tile is; null: its own
//   w_gpkc     matrices packed by `transpose` in packing.cu: groups, panels of 128 columns (padded
//              with zeros), k, columns
//   tiles      (group, first row, rows, -) of up to ROWS rows; without a list, rows in steps of
//              ROWS, group 0
//
// A CTA makes 32 columns of one tile, or of a gated product 32 of w1 and 32 of w3.  For each range of
// k and 32 columns it has a team of warps, a lane for each column, and each warp sums some of the
// rows.  A team copies what it multiplies through stages of its own and waits for no other before the
// end.  If it is known before the kernel ahead has ended which W that is, the copies begin by then.
#include "async_copy.cuh"
#include "dependent.cuh"
#include "shared_memory.cuh"
#include "silu.cuh"

constexpr int kRows = ROWS, kTeam = TEAM, kStages = STAGES, kVector = VECTOR;
constexpr int kRanges = GROUPS, kPanel = WIDTH, kColumns = 32, kStageK = STEP;
constexpr int kRowsOfWarp = kRows / kTeam;
constexpr int kStageW = kStageK * kColumns, kStage = kStageW + kRows * kStageK;  // floats
static_assert(kRows % kTeam == 0 && kStageK / 4 % kTeam == 0, "warps of a team have equal shares");
static_assert(RUN == kColumns, "a gated product's columns of w1 and w3 lie side by side");

extern __shared__ __align__(128) float shared[];  // the teams' stages, then sums

struct Operands {
  const float* a;
  const int* source;
  const float *w_gpkc, *bias_n;
  float* out;
  const int4* tiles;
  const int* tile_count;
  int are_known;  // the tiles, before the kernel ahead of this one has ended
  int m, inputs, k, width, n;
};

struct Tile {
  int group, row, rows;
};

// Where a range of k begins: ranges are whole steps, so that all chips add in the same order.
__device__ __forceinline__ int begin_of(int range, int k) { return k / STEP * range / kRanges * STEP; }

__device__ __forceinline__ void wait_for_team(int team) {
  if constexpr (kTeam == 1) __syncwarp();
  else synchronize_group<32 * kTeam>(team);
}

// What a thread copies into stages, one after the other, and what it multiplies.
template <int kUnits>
struct Lane {
  static constexpr int kCopies = kStageK / kVector;  // of a row, into a stage
  static constexpr int kAtOnce = 32 / kCopies;       // rows that a warp copies at once
  static constexpr int kParts = (kRowsOfWarp + kAtOnce - 1) / kAtOnce;

  int team, member, lane;
  float *stages, *stage;        // of the team; the one that is read, and then filled again
  const float *w, *a[kParts];   // what is copied into the next stage; a is null where a row is missing
  int a_left, stages_left;      // elements of a row, and stages, that were not copied yet
  int count;                    // stages of this range

  __device__ __forceinline__ explicit Lane(const Operands& with) {
    int warp = threadIdx.x / 32;
    lane = threadIdx.x % 32, member = warp % kTeam, team = warp / kTeam;
    int range = team / kUnits, begin = begin_of(range, with.k);
    int column = (blockIdx.x * kUnits + team % kUnits) * kColumns + lane % 8 * 4;
    count = stages_left = (begin_of(range + 1, with.k) - begin) / kStageK;
    stage = stages = shared + team * kStages * kStage;
    w = with.w_gpkc + column % kPanel +
        (size_t(column / kPanel) * with.k + begin + 4 * member + lane / 8) * kPanel;
    a_left = with.inputs - begin - lane % kCopies * kVector;
  }

  __device__ __forceinline__ int row_of(int part) const {
    return member * kRowsOfWarp + part * kAtOnce + lane / kCopies;
  }

  __device__ __forceinline__ void find_rows(const Operands& with, const Tile& tile) {
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      a[i] = nullptr;
      if (row_of(i) >= min(tile.rows, (member + 1) * kRowsOfWarp)) continue;
      int row = tile.row + row_of(i), from = with.source ? with.source[row] : row;
      a[i] = with.a + (size_t(from) + 1) * with.inputs - a_left;
    }
  }

  // Starts the copies of W, of which each warp of a team has every kTeam-th four k.
  __device__ __forceinline__ void copy_w(float* to) {
    to += (4 * member + lane / 8) * kColumns + lane % 8 * 4;
#pragma unroll
    for (int k = 0; k < kStageK; k += 4 * kTeam)
      copy_async<16>(to + k * kColumns, w + k * kPanel, 16);
    w += kStageK * kPanel;
  }

  // The same for rows, with zeros beyond their last element.
  __device__ __forceinline__ void copy_a(float* to) {
    to += kStageW + lane % kCopies * kVector;
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      if (!a[i]) continue;
      copy_async<4 * kVector>(to + row_of(i) * kStageK, a[i], a_left > 0 ? 4 * kVector : 0);
      a[i] += kStageK;
    }
    a_left -= kStageK;
  }

  __device__ __forceinline__ void copy_first_w() {
#pragma unroll
    for (int i = 0; i < kStages; ++i)
      if (i < count) copy_w(stages + i * kStage);
  }

  __device__ __forceinline__ void copy_first_a() {
#pragma unroll
    for (int i = 0; i < kStages; ++i) {
      if (i < count) copy_a(stages + i * kStage);
      commit_copies();
    }
    stages_left -= kStages;
  }

  // Fills the stage that was read.
  __device__ __forceinline__ void refill() {
    if (stages_left > 0) copy_w(stage), copy_a(stage);
    commit_copies();
    --stages_left;
    stage = stage == stages + (kStages - 1) * kStage ? stages : stage + kStage;
  }

  // Multiplies a stage by kSummed rows, whatever rows there are.
  template <int kSummed>
  __device__ __forceinline__ void multiply(float (&acc)[kSummed]) const {
    const float *of_w = stage + lane, *of_a = stage + kStageW + member * kRowsOfWarp * kStageK;
#pragma unroll
    for (int k = 0; k < kStageK; k += 4) {
      float4 a4[kSummed];
#pragma unroll
      for (int row = 0; row < kSummed; ++row)
        a4[row] = *reinterpret_cast<const float4*>(of_a + row * kStageK + k);
      float w4[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) w4[i] = of_w[(k + i) * kColumns];
#pragma unroll
      for (int row = 0; row < kSummed; ++row) {
        acc[row] = fmaf(a4[row].x, w4[0], acc[row]);
        acc[row] = fmaf(a4[row].y, w4[1], acc[row]);
        acc[row] = fmaf(a4[row].z, w4[2], acc[row]);
        acc[row] = fmaf(a4[row].w, w4[3], acc[row]);
      }
    }
  }

  // Where the sums of the CTA lie afterwards, in memory that has been stages.
  __device__ static __forceinline__ float& sum_at(int range, int row, int unit, int column) {
    return shared[((range * kRows + row) * kUnits + unit) * kColumns + column];
  }

  // Sums kSummed rows of this warp, whose first stages are on their way, and shares the sums.
  template <int kSummed>
  __device__ __forceinline__ void sum() {
    float acc[kSummed] = {};
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      wait_copies<kStages - 1>();
      wait_for_team(team);
      multiply(acc);
      wait_for_team(team);
      refill();
    }
    __syncthreads();
#pragma unroll
    for (int row = 0; row < kSummed; ++row)
      sum_at(team / kUnits, member * kRowsOfWarp + row, team % kUnits, lane) = acc[row];
  }

  // Sums as many rows as this warp has, or up to twice as many.
  template <int kSummed = 1>
  __device__ __forceinline__ void sum_rows(int rows) {
    if constexpr (kSummed < kRowsOfWarp)
      if (rows > kSummed) return sum_rows<2 * kSummed>(rows);
    sum<kSummed>();
  }

  // Adds the ranges' sums to +0, in the order of k.
  __device__ static __forceinline__ float total(int row, int unit, int column) {
    float sum = 0.0f;
#pragma unroll
    for (int range = 0; range < kRanges; ++range) sum += sum_at(range, row, unit, column);
    return sum;
  }
};

// out_mn = A @ W + bias_n (null for none)
struct Linear {
  static constexpr int kUnits = 1;  // of 32 columns, for those of the result

  static __device__ __forceinline__ float result(const Operands& with, int row, int i, int column) {
    return Lane<1>::total(row, 0, i) + (with.bias_n ? with.bias_n[column] : 0.0f);
  }
};

// out_mn = silu(A @ w1) * (A @ w3); W has 32 columns of w1, then 32 of w3, and so on.
struct Gated {
  static constexpr int kUnits = 2;

  static __device__ __forceinline__ float result(const Operands&, int row, int i, int) {
    return silu(Lane<2>::total(row, 0, i)) * Lane<2>::total(row, 1, i);
  }
};

template <class Epilogue>
__device__ __forceinline__ void compute(const Operands& with) {
  Lane<Epilogue::kUnits> lane(with);
  int first = blockIdx.y * kRows;
  Tile tile{0, first, min(kRows, with.m - first)};
  if (!with.are_known) wait_for_previous();
  if (with.tiles) {
    int count = early(with.tile_count);
    int4 listed = early(with.tiles + blockIdx.y);  // not after the count: the list is as long as the grid
    tile = {listed.x, listed.y, int(blockIdx.y) < count ? listed.z : -1};
    lane.w += size_t(tile.group) * with.width * with.k;
  }
  if (tile.rows >= 0) lane.copy_first_w();
  wait_for_previous();
  let_next_start();
  if (tile.rows < 0) return;
  lane.find_rows(with, tile);
  lane.copy_first_a();
  lane.sum_rows(tile.rows - lane.member * kRowsOfWarp);
  __syncthreads();
  for (int q = threadIdx.x; q < tile.rows * kColumns; q += blockDim.x) {
    int row = q / kColumns, i = q % kColumns, column = blockIdx.x * kColumns + i;
    if (column < with.n)
      with.out[size_t(tile.row + row) * with.n + column] = Epilogue::result(with, row, i, column);
  }
}

extern "C" __global__ void __launch_bounds__(32 * kRanges * kTeam)
    linear_few(const float* a, const int* source, const float* w_gpkc, const float* bias_n,
               float* out_mn, const int4* tiles, const int* tile_count, int are_known, int m,
               int inputs, int k, int width, int n) {
  compute<Linear>({a, source, w_gpkc, bias_n, out_mn, tiles, tile_count, are_known, m, inputs, k,
                   width, n});
}

extern "C" __global__ void __launch_bounds__(32 * kRanges * 2 * kTeam)
    gated_few(const float* a, const int* source, const float* w_gpkc, float* out_mn,
              const int4* tiles, const int* tile_count, int are_known, int m, int inputs, int k,
              int width, int n) {
  compute<Gated>({a, source, w_gpkc, nullptr, out_mn, tiles, tile_count, are_known, m, inputs, k,
                  width, n});
}
