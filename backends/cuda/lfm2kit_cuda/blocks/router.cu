// The router: scores = sigmoid(gate x), the TAKEN best of EXPERTS by score + bias, their weights.
// t tokens, h hidden_size, e = EXPERTS, k = TAKEN.  Float32 in every precision.
//
// A block takes kRows rows.  Its warps share out h, each over a fixed range and in order, and the
// warps' sums are added in order: a row's bits do not depend on the rows beside it.  Lane e holds
// expert e's sum; then warp r chooses for row r.
#include "reduce.cuh"

constexpr int kWarps = 16, kRows = 8, kStep = 32;
constexpr int kPerLane = (EXPERTS + kWarp - 1) / kWarp;
static_assert(kWarps >= kRows, "a warp chooses for each row");

// In double, rounded once: exactly 1 or 0 where float has nothing between.
__device__ inline float sigmoid(float logit) { return float(1 / (1 + exp(-double(logit)))); }

// The better of two candidates: the higher score, the lower id among equals; id -1 is none.
__device__ inline bool is_better(float score, int id, float than, int than_id) {
  if (id < 0 || than_id < 0) return id >= 0;
  return score > than || (score == than && id < than_id);
}

// The sums of this warp's range of h for all rows, to sums_re.  A step's weights are all asked for
// before the first is used: what takes time here is waiting for them.
__device__ void partial_logits(const float* x_th, const float* gate_he, float* sums_re,
                               float4 (*x_rk)[kStep / 4], int row0, int rows, int h) {
  int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int range = (h + kWarps * kStep - 1) / (kWarps * kStep) * kStep;
  int begin = min(warp * range, h), end = min(begin + range, h);
  float sum[kRows][kPerLane] = {};
  for (int k0 = begin; k0 < end; k0 += kStep) {
    __syncwarp();
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      reinterpret_cast<float*>(x_rk[r])[lane] =
          r < rows && k0 + lane < end ? x_th[size_t(row0 + r) * h + k0 + lane] : 0;
    __syncwarp();
#pragma unroll
    for (int e = 0; e < kPerLane; ++e) {
      int expert = lane + e * kWarp;
      float gate[kStep];
#pragma unroll
      for (int k = 0; k < kStep; ++k)
        gate[k] = expert < EXPERTS && k0 + k < end ? gate_he[size_t(k0 + k) * EXPERTS + expert] : 0;
#pragma unroll
      for (int k = 0; k < kStep; k += 4)
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          float4 x = x_rk[r][k / 4];
          sum[r][e] = fmaf(gate[k], x.x, sum[r][e]);
          sum[r][e] = fmaf(gate[k + 1], x.y, sum[r][e]);
          sum[r][e] = fmaf(gate[k + 2], x.z, sum[r][e]);
          sum[r][e] = fmaf(gate[k + 3], x.w, sum[r][e]);
        }
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int e = 0; e < kPerLane; ++e)
      if (lane + e * kWarp < EXPERTS) sums_re[r * EXPERTS + lane + e * kWarp] = sum[r][e];
}

extern "C" __global__ void __launch_bounds__(kWarps* kWarp)
    route(const float* x_th, const float* gate_he, const float* bias_e, int* expert_ids_tk,
          float* expert_weights_tk, int tokens, int h, int normalise, float scaling) {
  extern __shared__ float sums_wre[];
  __shared__ float4 x_wrk[kWarps][kRows][kStep / 4];
  int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int row0 = blockIdx.x * kRows, rows = min(kRows, tokens - row0);
  partial_logits(x_th, gate_he, sums_wre + warp * kRows * EXPERTS, x_wrk[warp], row0, rows, h);
  __syncthreads();
  if (warp >= rows) return;

  float score[kPerLane], biased[kPerLane];
  bool is_taken[kPerLane] = {};
#pragma unroll
  for (int e = 0; e < kPerLane; ++e) {
    int expert = lane + e * kWarp;
    if (expert >= EXPERTS) continue;
    float logit = 0;
    for (int w = 0; w < kWarps; ++w) logit += sums_wre[(w * kRows + warp) * EXPERTS + expert];
    score[e] = sigmoid(logit);
    biased[e] = bias_e ? score[e] + bias_e[expert] : score[e];
  }
  int ids[TAKEN];
  float weights[TAKEN], total = 0;
#pragma unroll
  for (int k = 0; k < TAKEN; ++k) {
    float best = 0, weight = 0;
    int id = -1;
#pragma unroll
    for (int e = 0; e < kPerLane; ++e) {
      int expert = lane + e * kWarp;
      if (expert < EXPERTS && !is_taken[e] && is_better(biased[e], expert, best, id))
        best = biased[e], id = expert, weight = score[e];
    }
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      float other = __shfl_down_sync(~0u, best, offset), its = __shfl_down_sync(~0u, weight, offset);
      int other_id = __shfl_down_sync(~0u, id, offset);
      if (lane + offset < kWarp && is_better(other, other_id, best, id))
        best = other, id = other_id, weight = its;
    }
    ids[k] = __shfl_sync(~0u, id, 0);
    weights[k] = __shfl_sync(~0u, weight, 0);
    total += weights[k];
#pragma unroll
    for (int e = 0; e < kPerLane; ++e)
      if (lane + e * kWarp == ids[k]) is_taken[e] = true;
  }
  if (lane > 0) return;
#pragma unroll
  for (int k = 0; k < TAKEN; ++k) {
    size_t at = size_t(row0 + warp) * TAKEN + k;
    float weight = normalise ? weights[k] / (total + 1e-6f) : weights[k];
    expert_ids_tk[at] = ids[k];
    expert_weights_tk[at] = weight * scaling;
  }
}
