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

template <class Stored>
struct alignas(2 * sizeof(Stored)) Two {
  u32 words[sizeof(Stored) / 2];
};

// The i-th element of this lane, if it is below HEAD_DIM.
__device__ inline int element(int i) {
  int lane = threadIdx.x % kWarp;
  return kInTwos ? i / 2 * 2 * kWarp + 2 * lane + i % 2 : lane + i * kWarp;
}

// This lane's elements of a row.
template <class Stored>
__device__ inline void read_elements(const Stored* row, float (&to)[kDims]) {
  constexpr int kPerWord = Stored::kPerWord;
#pragma unroll
  for (int i = 0; i < kDims; i += kInTwos ? 2 : 1) {
    if constexpr (kInTwos) {
      Two<Stored> two = *reinterpret_cast<const Two<Stored>*>(row + element(i));
#pragma unroll
      for (int w = 0; w < 2 / kPerWord; ++w) Stored::widen(two.words[w], to + i + w * kPerWord);
    } else {
      to[i] = element(i) < HEAD_DIM ? Stored::to_float(row[element(i)]) : 0;
    }
  }
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

// The weights of a tile in shared memory: those of a warp's pair p begin p * apart floats from `first`.
struct Weights {
  float* first;
  int apart;

  __device__ float& of(int p, int j) const { return first[p * apart + j]; }
};

// What a warp works with: the queries in shared memory, of which its pair p is first + p * step, and
// room for the weights of a tile.
template <int kMine>
struct Pairs {
  const float (*queries)[HEAD_DIM];
  int first, step, last;
  Weights weights;

  __device__ const float* query(int p) const { return queries[min(first + p * step, last)]; }
};

// score[p] = query of pair p . key of this lane.  kUnrolled elements are one run of instructions.
template <int kUnrolled, int kMine>
__device__ inline void score_keys(const Tile& tile, const Pairs<kMine>& pairs,
                                  float (&score)[kMine]) {
  int lane = threadIdx.x % kWarp;
#pragma unroll(kUnrolled / kPiece)
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

// Adds the weighted values of a tile, kUnrolled of them in one run.  Where not all pairs see all keys,
// those that do not see one must add nothing: not 0 times a value, which may not be finite.
template <bool kAllSee, int kUnrolled, int kMine>
__device__ inline void add_values(const Tile& tile, const Weights& weights, Sums<kMine>& sums,
                                  const int (&seen)[kMine]) {
#pragma unroll(kUnrolled)
  for (int j = 0; j < kTile; ++j) {
    float value[kDims];
    read_elements(tile.values[j], value);
#pragma unroll
    for (int p = 0; p < kMine; ++p) {
      float weight = weights.of(p, j);
      if (!kAllSee && j >= seen[p]) continue;
#pragma unroll
      for (int i = 0; i < kDims; ++i) sums.of[p][i] = fmaf(weight, value[i], sums.of[p][i]);
    }
  }
}

// What a tile does to a pair: its sums fade, as the maximum rises, and this lane's key has a weight.
struct Step {
  float fade, weight;
};

// The step to a tile of which the pair sees the first `seen` keys, with the maximum `highest`.
__device__ inline Step step(float& most, float highest, float scaled, int seen) {
  float now = fmaxf(most, highest), fade = expf(most - now), weight = expf(scaled - now);
  most = now;
  return {seen > 0 ? fade : 1, int(threadIdx.x % kWarp) < seen ? weight : 0};
}

// The score of this lane's key, if it is among the first `seen`.
__device__ inline float scaled_score(float score, int seen, float scale) {
  return int(threadIdx.x % kWarp) < seen ? __fmul_rn(score, scale) : -infinity();
}

template <int kMine>
__device__ inline void fade_values(Sums<kMine>& sums, int p, float fade) {
#pragma unroll
  for (int i = 0; i < kDims; ++i) sums.of[p][i] = __fmul_rn(sums.of[p][i], fade);
}

// Adds a tile of which pair p sees the first seen[p] keys.
template <int kMine>
__device__ inline void add_tile(const Tile& tile, const Pairs<kMine>& pairs, Sums<kMine>& sums,
                                const int (&seen)[kMine], float scale) {
  int lane = threadIdx.x % kWarp, least_seen = kTile;
  float score[kMine] = {}, highest[kMine], weight[kMine], fade[kMine];
  score_keys<16>(tile, pairs, score);
#pragma unroll
  for (int p = 0; p < kMine; ++p) highest[p] = score[p] = scaled_score(score[p], seen[p], scale);
  warp_maxima(highest);
#pragma unroll
  for (int p = 0; p < kMine; ++p) {
    Step next = step(sums.most[p], highest[p], score[p], seen[p]);
    fade[p] = next.fade, weight[p] = next.weight;
    // Those of the tile before have been read: all met in Tiles::at.
    pairs.weights.of(p, lane) = weight[p];
    fade_values(sums, p, fade[p]);
    least_seen = min(least_seen, seen[p]);
  }
  warp_sums(weight);
#pragma unroll
  for (int p = 0; p < kMine; ++p) sums.total[p] = fmaf(sums.total[p], fade[p], weight[p]);
  __syncwarp();
  if (least_seen == kTile) add_values<true, 8>(tile, pairs.weights, sums, seen);
  else add_values<false, 8>(tile, pairs.weights, sums, seen);
}

// Sums the keys from `begin`, where a part begins, up to `end`; pair p sees those below context[p].
template <int kMine>
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
