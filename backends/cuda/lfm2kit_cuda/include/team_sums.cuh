// How the warps of a CTA sum a part together, for the query heads of one row and key head: with the
// operations of add_tile, in the same order for each head, but so that few wait for others.  First
// each warp scores some tiles of a span for all heads, and each key is read once.  Then each warp has
// some of the heads: it makes weights of the scores of all tiles at once, and only the weighted values
// are added key after key.
#pragma once
#include "attention_sums.cuh"
#include "heads.cuh"

constexpr int kSpanTiles = SPAN_TILES < kPartKeys / kTile ? SPAN_TILES : kPartKeys / kTile;
constexpr int kSpanKeys = kSpanTiles * kTile;
static_assert(kPartKeys % kSpanKeys == 0, "a part has whole spans");
constexpr int kHeadsOfWarp = (kGroup + kWarps - 1) / kWarps;
// Where a CTA has more warps than a span has tiles, several score a tile, each for some heads.
constexpr int kWarpsOfTile = kWarps > kSpanTiles ? kWarps / kSpanTiles : 1;
constexpr int kScorers = kGroup < kWarpsOfTile ? kGroup : kWarpsOfTile;
constexpr int kScored = (kGroup + kScorers - 1) / kScorers;
static_assert(kScorers * kScored <= kHeadsOfWarp * kWarps, "scores have room");

using TeamSums = Sums<kHeadsOfWarp>;

// Which of the key head's query heads is this warp's head p; the last ones may not exist.
__device__ inline int head_of_warp(int p) { return threadIdx.x / kWarp + p * kWarps; }

struct Team {
  float queries[kGroup][HEAD_DIM];
  alignas(16) float scores[kHeadsOfWarp * kWarps][kSpanKeys];  // then weights, in their places
};

// Scores the first `keys` keys of a span.
__device__ inline void score_span(Team& team, const Tile* span, int keys) {
  for (int i = threadIdx.x / kWarp; i < kSpanTiles * kScorers; i += kWarps) {
    int t = i % kSpanTiles, first = i / kSpanTiles * kScored;
    if (t * kTile >= keys) continue;
    float score[kScored] = {};
    score_keys<64>(span[t], Pairs<kScored>{team.queries, first, 1, kGroup - 1, {}}, score);
#pragma unroll
    for (int p = 0; p < kScored; ++p)
      team.scores[first + p][t * kTile + threadIdx.x % kWarp] = score[p];
  }
}

// Makes weights of a head's scores.  Lane t gets what its sums are to be multiplied with before the
// values of tile t are added.
__device__ inline float weigh(float* scores, float& most, float& total, int keys, float scale) {
  int lane = threadIdx.x % kWarp;
  float scaled[kSpanTiles], highest[kSpanTiles], weight[kSpanTiles], fade[kSpanTiles], of_lane = 1;
#pragma unroll
  for (int t = 0; t < kSpanTiles; ++t)
    highest[t] = scaled[t] = scaled_score(scores[t * kTile + lane], keys - t * kTile, scale);
  warp_maxima(highest);
#pragma unroll
  for (int t = 0; t < kSpanTiles; ++t) {
    Step next = step(most, highest[t], scaled[t], keys - t * kTile);
    fade[t] = next.fade, weight[t] = next.weight;
    scores[t * kTile + lane] = weight[t];
    if (lane == t) of_lane = fade[t];
  }
  warp_sums(weight);
#pragma unroll
  for (int t = 0; t < kSpanTiles; ++t) total = fmaf(total, fade[t], weight[t]);
  return of_lane;
}

// Adds the first `keys` keys of a span, which have been scored, to the sums of this warp's heads.
__device__ inline void add_span(Team& team, const Tile* span, TeamSums& sums, int keys, float scale) {
  float fades[kHeadsOfWarp];
  if (head_of_warp(0) >= kGroup) return;
#pragma unroll
  for (int p = 0; p < kHeadsOfWarp; ++p)
    fades[p] = weigh(team.scores[head_of_warp(p)], sums.most[p], sums.total[p], keys, scale);
  __syncwarp();
  for (int t = 0; t * kTile < keys; ++t) {
    int seen[kHeadsOfWarp];
#pragma unroll
    for (int p = 0; p < kHeadsOfWarp; ++p) {
      seen[p] = keys - t * kTile;
      fade_values(sums, p, __shfl_sync(~0u, fades[p], t));
    }
    Weights weights{team.scores[head_of_warp(0)] + t * kTile, kWarps * kSpanKeys};
    if (seen[0] >= kTile) add_values<true, kTile / kHeadsOfWarp>(span[t], weights, sums, seen);
    else add_values<false, kTile / kHeadsOfWarp>(span[t], weights, sums, seen);
  }
}
