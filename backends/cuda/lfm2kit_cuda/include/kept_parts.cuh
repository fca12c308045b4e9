// What CTAs that share a row keep of each part in memory, and how one adds it, as add_part does.
#pragma once
#include "attention_sums.cuh"

struct alignas(8) Kept {  // the weighted values, and softmax's maximum and sum
  F32 of[HEAD_DIM];
  float most, total;
};

template <int kMine>
__device__ inline void keep_part(Kept& kept, const Sums<kMine>& sums, int p) {
#pragma unroll
  for (int i = 0; i < kDims; ++i)
    if (element(i) < HEAD_DIM) kept.of[element(i)] = F32{sums.of[p][i]};
  if (threadIdx.x % kWarp == 0) kept.most = sums.most[p], kept.total = sums.total[p];
}

// Parts that are read at once, and those of them that are added without a branch.
constexpr int kPartsAtOnce = kDims <= 2 ? 32 : kDims <= 4 ? 16 : 8, kStepParts = 8;
static_assert(kPartsAtOnce % kStepParts == 0, "whole steps");

using Values = float[kPartsAtOnce][kDims];

// Reads this lane's elements of the first `count` parts; after the last one it is read again.
__device__ inline void read_parts(const Kept* kept, int count, Values& values) {
#pragma unroll
  for (int j0 = 0; j0 < kPartsAtOnce; j0 += kStepParts) {
    if (j0 >= count) break;
#pragma unroll
    for (int j = j0; j < j0 + kStepParts; ++j) read_elements(kept[min(j, count - 1)].of, values[j]);
  }
}

// The maximum of lanes 0 to this one, and of what was before them.
__device__ inline float most_so_far(float most, float before) {
  int lane = threadIdx.x % kWarp;
  for (int offset = 1; offset < kWarp; offset *= 2) {
    float other = __shfl_sync(~0u, most, max(lane - offset, 0));
    if (lane >= offset) most = fmaxf(most, other);
  }
  return fmaxf(before, most);
}

// A lane's part: how the sums before it and its own are scaled, and softmax's sum.
struct Scaled {
  float fade, gain, total;

  // `most` is the maximum before all of these parts, and then with them.
  __device__ Scaled(const Kept& kept, float& most) : total(kept.total) {
    float its_most = kept.most, now = most_so_far(its_most, most);
    float before = __shfl_sync(~0u, now, max(int(threadIdx.x % kWarp) - 1, 0));
    if (threadIdx.x % kWarp == 0) before = most;
    fade = expf(before - now), gain = expf(its_most - now);
    most = __shfl_sync(~0u, now, kPartsAtOnce - 1);
  }
};

// Adds kStepParts parts from j0 on, of which `count` are there.
__device__ inline void add_step(Sums<1>& sums, const Scaled& lane, const Values& values, int j0,
                                int count) {
  float fade[kStepParts], gain[kStepParts], total[kStepParts];
#pragma unroll
  for (int j = 0; j < kStepParts; ++j) {
    fade[j] = __shfl_sync(~0u, lane.fade, j0 + j), gain[j] = __shfl_sync(~0u, lane.gain, j0 + j);
    total[j] = __shfl_sync(~0u, lane.total, j0 + j);
  }
#pragma unroll
  for (int j = 0; j < kStepParts; ++j) {
    if (j >= count) continue;
    sums.total[0] = added(sums.total[0], fade[j], total[j], gain[j]);
#pragma unroll
    for (int i = 0; i < kDims; ++i)
      sums.of[0][i] = added(sums.of[0][i], fade[j], values[j0 + j][i], gain[j]);
  }
}

// Adds parts in their order.  How each is scaled is known from the maxima alone.
__device__ inline Sums<1> add_kept(const Kept* kept, int count) {
  Sums<1> sums{{kept[0].most}, {kept[0].total}};
  read_elements(kept[0].of, sums.of[0]);
  for (int first = 1; first < count; first += kPartsAtOnce) {
    int left = count - first;
    const Kept& of_lane = kept[first + min(int(threadIdx.x % kWarp), left - 1)];
    Values values;
    read_parts(kept + first, left, values);
    Scaled lane(of_lane, sums.most[0]);
#pragma unroll
    for (int j0 = 0; j0 < kPartsAtOnce; j0 += kStepParts) {
      if (j0 >= left) break;
      add_step(sums, lane, values, j0, left - j0);
    }
  }
  return sums;
}
