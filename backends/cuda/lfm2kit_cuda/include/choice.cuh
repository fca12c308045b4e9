// The choice of a row's experts, by a warp: lane e has the experts e, e + 32, ... of EXPERTS.
#pragma once
#include "rank.cuh"
#include "reduce.cuh"
#include "types.cuh"

constexpr int kSplits = SPLITS;  // whose sums make a logit
constexpr int kPanel = PANEL;    // experts of a CTA of `logits`
static_assert(kPanel == kWarp, "a lane has one expert of a panel");
constexpr int kPanels = (EXPERTS + kPanel - 1) / kPanel;

// The sigmoid in double, rounded once: exactly 1 or 0 where float has nothing between.
__device__ inline float sigmoid(float logit) { return float(1 / (1 + exp(-double(logit)))); }

// The score of a row's expert, from the sums of its logit; 0 where there is no such expert.
__device__ inline float score_of(const float* sums_ste, int tokens, int row, int expert) {
  float sums[kSplits], logit = 0;
#pragma unroll
  for (int s = 0; s < kSplits; ++s)
    sums[s] = expert < EXPERTS ? sums_ste[(size_t(s) * tokens + row) * EXPERTS + expert] : 0;
#pragma unroll
  for (int s = 0; s < kSplits; ++s) logit += sums[s];
  return sigmoid(logit);
}

// The experts of a row and their weights, in every lane.
struct Chosen {
  int ids[TAKEN];
  float weights[TAKEN];

  __device__ void store(int row, int* expert_ids_tk, float* expert_weights_tk) const {
#pragma unroll
    for (int k = 0; k < TAKEN; ++k) {
      expert_ids_tk[size_t(row) * TAKEN + k] = ids[k];
      expert_weights_tk[size_t(row) * TAKEN + k] = weights[k];
    }
  }
};

// Chooses by scores.  Where one is NaN, which has no order, the bias selects alone, and the weights are NaN.
__device__ inline Chosen chosen_by(const float (&score)[kPanels], const float* bias_e, int normalise,
                                   float scaling) {
  int lane = threadIdx.x % kWarp;
  u32 rank[kPanels];  // 0 where there is no expert, or it is taken
  bool is_nan = false;
#pragma unroll
  for (int p = 0; p < kPanels; ++p) is_nan |= score[p] != score[p];
  is_nan = __any_sync(~0u, is_nan);
#pragma unroll
  for (int p = 0; p < kPanels; ++p) {
    int expert = lane + p * kWarp;
    float biased = is_nan ? 0 : score[p];
    if (bias_e && expert < EXPERTS) biased += bias_e[expert];
    rank[p] = expert < EXPERTS ? rank_of(biased) : 0;
  }
  Chosen chosen;
  float total = 0;
#pragma unroll
  for (int k = 0; k < TAKEN; ++k) {
    u32 mine = 0;
#pragma unroll
    for (int p = 0; p < kPanels; ++p) mine = max(mine, rank[p]);
    u32 best = warp_max(mine);
    int id = EXPERTS;
    float weight = 0;
#pragma unroll
    for (int p = kPanels - 1; p >= 0; --p) {  // the lowest id among equals
      u32 equals = __ballot_sync(~0u, rank[p] == best);
      if (!equals) continue;
      id = __ffs(equals) - 1 + p * kWarp;
      weight = score[p];
    }
    chosen.ids[k] = id;
    chosen.weights[k] = __shfl_sync(~0u, weight, id % kWarp);
    total += chosen.weights[k];
#pragma unroll
    for (int p = 0; p < kPanels; ++p)
      if (lane + p * kWarp == id) rank[p] = 0;
  }
#pragma unroll
  for (int k = 0; k < TAKEN; ++k) {
    float weight = normalise ? chosen.weights[k] / (total + 1e-6f) : chosen.weights[k];
    chosen.weights[k] = is_nan ? __int_as_float(0x7fc00000) : weight * scaling;
  }
  return chosen;
}

// Chooses by score_at(row, expert), which is 0 where there is no such expert.
template <class ScoreAt>
__device__ inline Chosen choose_of_row(int row, const float* bias_e, int normalise, float scaling,
                                       ScoreAt score_at) {
  float score[kPanels];
#pragma unroll
  for (int p = 0; p < kPanels; ++p) score[p] = score_at(row, threadIdx.x % kWarp + p * kWarp);
  return chosen_by(score, bias_e, normalise, scaling);
}
