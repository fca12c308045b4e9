// The router: scores = sigmoid(gate x), the TAKEN best of EXPERTS by score + bias, their weights.
// A whole router is `logits` and `choose_by_sums`, its scores alone are `logits` and `score`, and its
// choice alone is `choose`.  For few tokens, grouping.cu chooses and groups at once.
// t tokens, h hidden_size, e = EXPERTS, k = TAKEN.  Float32 in every precision.
//
// HIDDEN is cut into kSplits x kWarps pieces of kPiece: `logits` sums each piece on its own, in
// order, and adds a CTA's pieces in order; `score_of` adds the CTAs' sums in order.  So a row's
// bits depend neither on the rows beside it nor on how many there are.
#include "async_copy.cuh"
#include "choice.cuh"
#include "dependent.cuh"

constexpr int kWarps = WARPS, kRows = ROWS, kChoosingRows = CHOOSING_ROWS;
constexpr int kMostStep = MOST_STEP;
constexpr int kAtLeast = (HIDDEN + kSplits * kWarps * 4 - 1) / (kSplits * kWarps * 4) * 4;
constexpr int kStep = kAtLeast < kMostStep ? kAtLeast : kMostStep;
constexpr int kPiece = (kAtLeast + kStep - 1) / kStep * kStep;
constexpr int kRowX = kMostStep + 4;  // puts four rows in different banks
constexpr int kLaneRows = kRows / 4;

// What a warp has in shared memory.
struct WarpShared {
  float x_rk[kRows][kRowX], gate_ke[kStep][kPanel];
};

// Starts the copies of kStep rows of a panel of the gate.
__device__ inline void copy_gate(WarpShared& to, const float* gate_ke) {
#pragma unroll
  for (int i = threadIdx.x % kWarp; i < kStep * kPanel / 4; i += kWarp)
    copy_async<16>(to.gate_ke[0] + 4 * i, gate_ke + 4 * i, 16);
}

// Starts the copies of kStep columns from k0 on of the CTA's rows; zeros beyond the last row and column.
__device__ inline void copy_x(WarpShared& to, const float* x_rh, int rows, int k0) {
#pragma unroll
  for (int i = threadIdx.x % kWarp; i < kRows * kStep / VECTOR; i += kWarp) {
    int r = i / (kStep / VECTOR), k = i % (kStep / VECTOR) * VECTOR;
    bool is_there = r < rows && k0 + k < HIDDEN;
    copy_async<4 * VECTOR>(to.x_rk[r] + k, x_rh + (is_there ? size_t(r) * HIDDEN + k0 + k : 0),
                           is_there ? 4 * VECTOR : 0);
  }
}

// sums[i][j] += x[4 i + r] . gate[4 c + j] over a step; lane = 8 r + c.
__device__ inline void multiply(const WarpShared& from, float (&sums)[kLaneRows][4]) {
  int r = threadIdx.x % kWarp / 8, c = threadIdx.x % 8;
#pragma unroll 2
  for (int k = 0; k < kStep; k += 4) {
    float x[kLaneRows][4], gate[4][4];
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i)
      *reinterpret_cast<float4*>(x[i]) =
          *reinterpret_cast<const float4*>(from.x_rk[4 * i + r] + k);
#pragma unroll
    for (int l = 0; l < 4; ++l)
      *reinterpret_cast<float4*>(gate[l]) =
          *reinterpret_cast<const float4*>(from.gate_ke[k + l] + 4 * c);
#pragma unroll
    for (int l = 0; l < 4; ++l)
#pragma unroll
      for (int i = 0; i < kLaneRows; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] = fmaf(x[i][l], gate[l][j], sums[i][j]);
  }
}

// sums_ste[split] = the sums over a split's pieces; CTAs are (rows, split, panel).  The gate is
// packed by panels, its k padded with zeros to whole pieces.
extern "C" __global__ void __launch_bounds__(kWarps* kWarp)
    logits(const float* x_th, const float* gate_pke, float* sums_ste, int tokens) {
  __shared__ __align__(16) WarpShared shared[kWarps];
  int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int row0 = blockIdx.x * kRows, rows = min(kRows, tokens - row0);
  int k0 = (blockIdx.y * kWarps + warp) * kPiece;
  WarpShared& mine = shared[warp];
  const float* gate = gate_pke + (size_t(blockIdx.z) * kSplits * kWarps * kPiece + k0) * kPanel;
  float sums[kLaneRows][4] = {};
  for (int done = 0; done < kPiece; done += kStep) {
    __syncwarp();
    copy_gate(mine, gate + done * kPanel);
    if (done == 0) {
      wait_for_previous();
      let_next_start();
    }
    copy_x(mine, x_th + size_t(row0) * HIDDEN, rows, k0 + done);
    commit_copies();
    wait_copies<0>();
    __syncwarp();
    multiply(mine, sums);
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i)
    *reinterpret_cast<float4*>(mine.x_rk[4 * i + lane / 8] + lane % 8 * 4) =
        *reinterpret_cast<float4*>(sums[i]);
  __syncthreads();
  for (int i = threadIdx.x; i < rows * kPanel; i += kWarps * kWarp) {
    int row = i / kPanel, expert = blockIdx.z * kPanel + i % kPanel;
    float sum = shared[0].x_rk[row][i % kPanel];
    for (int w = 1; w < kWarps; ++w) sum += shared[w].x_rk[row][i % kPanel];
    if (expert < EXPERTS)
      sums_ste[(size_t(blockIdx.y) * tokens + row0 + row) * EXPERTS + expert] = sum;
  }
}

// CTAs are (rows, panel); a warp has a row, its lanes the experts of a panel.
extern "C" __global__ void __launch_bounds__(kChoosingRows* kWarp)
    score(const float* sums_ste, float* scores_te, int tokens) {
  int row = blockIdx.x * kChoosingRows + threadIdx.x / kWarp;
  int expert = blockIdx.y * kPanel + threadIdx.x % kWarp;
  wait_for_previous();
  let_next_start();
  if (row < tokens && expert < EXPERTS)
    scores_te[size_t(row) * EXPERTS + expert] = score_of(sums_ste, tokens, row, expert);
}

// Chooses the experts of each row; a warp has a row.
template <class ScoreAt>
__device__ inline void choose_of_rows(const float* bias_e, int* expert_ids_tk,
                                      float* expert_weights_tk, int tokens, int normalise,
                                      float scaling, ScoreAt score_at) {
  int row = blockIdx.x * kChoosingRows + threadIdx.x / kWarp;
  wait_for_previous();
  let_next_start();
  if (row >= tokens) return;
  Chosen chosen = choose_of_row(row, bias_e, normalise, scaling, score_at);
  if (threadIdx.x % kWarp == 0) chosen.store(row, expert_ids_tk, expert_weights_tk);
}

// From the sums of logits.
extern "C" __global__ void __launch_bounds__(kChoosingRows* kWarp)
    choose_by_sums(const float* sums_ste, const float* bias_e, int* expert_ids_tk,
                   float* expert_weights_tk, int tokens, int normalise, float scaling) {
  choose_of_rows(bias_e, expert_ids_tk, expert_weights_tk, tokens, normalise, scaling,
                 [=](int row, int expert) { return score_of(sums_ste, tokens, row, expert); });
}

// From scores.
extern "C" __global__ void __launch_bounds__(kChoosingRows* kWarp)
    choose(const float* scores_te, const float* bias_e, int* expert_ids_tk,
           float* expert_weights_tk, int tokens, int normalise, float scaling) {
  choose_of_rows(bias_e, expert_ids_tk, expert_weights_tk, tokens, normalise, scaling,
                 [=](int row, int expert) {
                   return expert < EXPERTS ? scores_te[size_t(row) * EXPERTS + expert] : 0.0f;
                 });
}
