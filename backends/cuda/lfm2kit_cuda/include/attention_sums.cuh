// Attention in float32 over keys that are cut into parts of PART_KEYS, from the sequence's first key
// on.  A part is summed from nothing, tile after tile, and parts are added in their order.  So the
// bits of a row depend on nothing but its own past, whoever sums its parts.  Operations that a compiler
// could fuse in one kernel and not in another are written as fused or as single ones.
//
// A warp steps through a tile with kMine pairs of a row and a query head at once, so that what it reads
// of a key or value serves all: lane j scores key j, then each lane sums some elements of the values.
#pragma once
#include "key_tiles.cuh"

constexpr int kDims = (HEAD_DIM + kWarp - 1) / kWarp;  // elements of a lane
constexpr bool kInTwos = HEAD_DIM % (2 * kWarp) == 0;  // neighbours, which are read at once

struct alignas(2 * sizeof(INNER)) Two {
  INNER of[2];
};

// The i-th element of this lane, if it is below HEAD_DIM.
__device__ inline int element(int i) {
  int lane = threadIdx.x % kWarp;
  return kInTwos ? i / 2 * 2 * kWarp + 2 * lane + i % 2 : lane + i * kWarp;
}

// What a warp has summed for its pairs: softmax's maximum and sum, and the weighted values.
template <int kMine>
struct Sums {
  float most[kMine], total[kMine], of[kMine][kDims];
};

template <int kMine>
__device__ inline Sums<kMine> nothing() {
  Sums<kMine> sums = {};
#pragma unroll
  for (int p = 0; p < kMine; ++p) sums.most[p] = -infinity();
  return sums;
}

// A sum with what comes next; both are scaled to the maximum of both.
__device__ inline float added(float sum, float fade, float next, float gain) {
  return fmaf(sum, fade, __fmul_rn(next, gain));
}

// Adds a part of pair p to the parts before it.
template <int kMine>
__device__ inline void add_part(Sums<kMine>& sums, const Sums<kMine>& part, int p) {
  float now = fmaxf(sums.most[p], part.most[p]);
  float fade = expf(sums.most[p] - now), gain = expf(part.most[p] - now);
  sums.most[p] = now;
  sums.total[p] = added(sums.total[p], fade, part.total[p], gain);
#pragma unroll
  for (int i = 0; i < kDims; ++i)
    sums.of[p][i] = added(sums.of[p][i], fade, part.of[p][i], gain);
}

// What a warp works with: the queries in shared memory, of which its pair p is first + p * step, and
// room for the weights of a tile.
template <int kMine>
struct Pairs {
  struct alignas(kMine % 4 == 0 ? 16 : 4) Weights {
    float of[kMine];
  };
  const float (*queries)[HEAD_DIM];
  int first, step, last;
  Weights* weights;

  __device__ const float* query(int p) const { return queries[min(first + p * step, last)]; }
};

// score[p] = query of pair p . key of this lane.
template <int kMine>
__device__ inline void score_keys(const Tile& tile, const Pairs<kMine>& pairs,
                                  float (&score)[kMine]) {
  int lane = threadIdx.x % kWarp;
#pragma unroll(kPiece < 8 ? 4 : 2)
  for (int d = 0; d < HEAD_DIM; d += kPiece) {
    WidePiece key = widened(&tile.keys[lane][d]);
#pragma unroll
    for (int p = 0; p < kMine; ++p) {
      WidePiece query = *reinterpret_cast<const WidePiece*>(pairs.query(p) + d);
#pragma unroll
      for (int i = 0; i < kPiece; ++i) score[p] = fmaf(query.of[i], key.of[i], score[p]);
    }
  }
}

// This lane's elements of value j.
__device__ inline void read_value(const Tile& tile, int j, float (&value)[kDims]) {
#pragma unroll
  for (int i = 0; i < kDims; i += kInTwos ? 2 : 1) {
    if constexpr (kInTwos) {
      Two two = *reinterpret_cast<const Two*>(&tile.values[j][element(i)]);
      value[i] = INNER::to_float(two.of[0]), value[i + 1] = INNER::to_float(two.of[1]);
    } else {
      value[i] = element(i) < HEAD_DIM ? INNER::to_float(tile.values[j][element(i)]) : 0;
    }
  }
}

// Adds the weighted values of keys begin to end.  Where not all pairs see all of them, those that do
// not must add nothing: not 0 times a value, which may not be finite.
template <bool kAllSee, int kMine>
__device__ inline void add_values(const Tile& tile, const Pairs<kMine>& pairs, Sums<kMine>& sums,
                                  const int (&seen)[kMine], int begin, int end) {
#pragma unroll(kAllSee ? 8 : 1)
  for (int j = begin; j < end; ++j) {
    float value[kDims];
    read_value(tile, j, value);
    typename Pairs<kMine>::Weights weights = pairs.weights[j];
#pragma unroll
    for (int p = 0; p < kMine; ++p) {
      if (!kAllSee && j >= seen[p]) continue;
#pragma unroll
      for (int i = 0; i < kDims; ++i)
        sums.of[p][i] = fmaf(weights.of[p], value[i], sums.of[p][i]);
    }
  }
}

// Adds a tile of which pair p sees the first seen[p] keys.
template <int kMine>
__device__ inline void add_tile(const Tile& tile, const Pairs<kMine>& pairs, Sums<kMine>& sums,
                                const int (&seen)[kMine], float scale) {
  int lane = threadIdx.x % kWarp, least_seen = kTile, most_seen = 0;
  float score[kMine] = {};
  score_keys(tile, pairs, score);
  typename Pairs<kMine>::Weights weights;
#pragma unroll
  for (int p = 0; p < kMine; ++p) {
    bool is_seen = lane < seen[p];
    float scaled = is_seen ? __fmul_rn(score[p], scale) : -infinity();
    float now = fmaxf(sums.most[p], warp_max(scaled));
    float fade = seen[p] > 0 ? expf(sums.most[p] - now) : 1;
    weights.of[p] = is_seen ? expf(scaled - now) : 0;
    sums.most[p] = now;
    sums.total[p] = fmaf(sums.total[p], fade, warp_sum(weights.of[p]));
#pragma unroll
    for (int i = 0; i < kDims; ++i) sums.of[p][i] = __fmul_rn(sums.of[p][i], fade);
    least_seen = min(least_seen, seen[p]);
    most_seen = max(most_seen, seen[p]);
  }
  pairs.weights[lane] = weights;  // those of the tile before have been read: all met in Tiles::at
  __syncwarp();
  add_values<true>(tile, pairs, sums, seen, 0, least_seen);
  add_values<false>(tile, pairs, sums, seen, max(least_seen, 0), most_seen);
}

// Sums the keys from `begin`, where a part begins, up to `end`; pair p sees those below context[p].
template <class Tiles, int kMine>
__device__ inline Sums<kMine> sum_part(Tiles& tiles, const Pairs<kMine>& pairs, int begin, int end,
                                       const int (&context)[kMine], float scale) {
  Sums<kMine> part = nothing<kMine>();
  tiles.start(begin, end);
  for (int t = 0; begin + t * kTile < end; ++t) {
    int key0 = begin + t * kTile, seen[kMine];
#pragma unroll
    for (int p = 0; p < kMine; ++p) seen[p] = min(min(kTile, end - key0), context[p] - key0);
    add_tile(tiles.at(t), pairs, part, seen, scale);
  }
  return part;
}
