// A row of scores that a cluster has: each of its warps has a part, of ids that follow each other, and
// tells the other warps numbers, such as the sum of its weights.
//
// Scores are compared by ranks: whole numbers in the same order.
#pragma once
#include "cluster.cuh"
#include "rank.cuh"

constexpr int kCtas = CTAS, kThreads = THREADS, kWarps = kThreads / 32;
constexpr int kParts = kCtas * kWarps;                                 // of a row
constexpr int kBits = BITS, kBins = 1 << kBits, kDigits = 32 / kBits;  // of a digit of a rank
static_assert(kBins <= kThreads && 32 % kBits == 0, "a thread has a bin of the sums");
constexpr u32 kLowestRank = 0x00800000u;  // of a finite score

static_assert(kCtas <= 32, "a lane sends to each CTA");

enum { kBest, kTotal, kEqual, kWeight, kTold };  // what a warp tells
enum { kTopK, kTopP, kFilters };                 // that look for a border
constexpr int kBarriers = kTold + kFilters * kDigits;
static_assert(kBarriers <= kThreads, "a thread prepares a barrier");

// Where the sums of what scores count for, in ascending order, pass a bound.
struct Border {
  u32 rank;
  u64 below, own;  // the sum of all lower scores, and of those that have this rank
};

// The shared memory of a CTA.
struct Cta {
  u64 told[kTold][kParts];    // by all warps
  u64 sums[2][kCtas][kBins];  // of all CTAs; two digits take turns
  u64 barriers[kBarriers];    // of what is told, and of the sums of each digit
  u64 sums_of_warps[kWarps];
  Border found;  // within a digit
};

__device__ inline int lane() { return threadIdx.x % 32; }
__device__ inline int warp() { return threadIdx.x / 32; }
__device__ inline u64 sum_of(u64 a, u64 b) { return a + b; }
__device__ inline double sum_of(double a, double b) { return a + b; }

template <class T>
__device__ inline T sum_of_warp(T mine) {
  for (int offset = 16; offset > 0; offset /= 2) mine = sum_of(mine, __shfl_xor_sync(~0u, mine, offset));
  return mine;
}

// Returns the sum of the values of this lane and of those before it.
__device__ inline u64 sum_up_to_lane(u64 mine) {
  for (int offset = 1; offset < 32; offset *= 2) {
    u64 before = __shfl_up_sync(~0u, mine, offset);
    if (lane() >= offset) mine += before;
  }
  return mine;
}

// Returns the sum of the values of this thread and of those before it, and the sum of the CTA.
__device__ inline u64 sum_up_to_thread(Cta* cta, u64 mine, u64* total) {
  u64 sum = sum_up_to_lane(mine);
  if (lane() == 31) cta->sums_of_warps[warp()] = sum;
  __syncthreads();
  *total = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp()) sum += cta->sums_of_warps[w];
    *total += cta->sums_of_warps[w];
  }
  return sum;
}

// All warps of a cluster tell each other a number.  Returns those of all parts.
template <class T>
__device__ inline const T* told_by_all(Cta* cta, int what, int part, T mine) {
  static_assert(sizeof(T) == sizeof(u64), "it is told in 64 bits");
  u64* told = cta->told[what];
  if (lane() < kCtas) send(lane(), &told[part], reinterpret_cast<u64&>(mine), &cta->barriers[what]);
  wait_for_sent(&cta->barriers[what]);
  return reinterpret_cast<const T*>(told);
}

// Returns the most of what all lanes of a cluster have.
__device__ inline u64 most_of_all(Cta* cta, int what, int part, u64 mine) {
  auto most_of_warp = [](u64 most) {
    for (int offset = 16; offset > 0; offset /= 2) most = max(most, __shfl_xor_sync(~0u, most, offset));
    return most;
  };
  const u64* told = told_by_all(cta, what, part, most_of_warp(mine));
  u64 most = 0;
  for (int other = lane(); other < kParts; other += 32) most = max(most, told[other]);
  return most_of_warp(most);
}

// The sum of a part, of those before it, and of all.
template <class T>
struct Sums {
  T own, before, all;
};

// Returns the sums of what all lanes of a cluster have, in an order that is always the same.
template <class T>
__device__ inline Sums<T> sums_of_all(Cta* cta, int what, int part, T mine) {
  T own = sum_of_warp(mine), before = 0, all = 0;
  const T* told = told_by_all(cta, what, part, own);
  for (int other = lane(); other < kParts; other += 32) {
    if (other < part) before += told[other];
    all += told[other];
  }
  return {own, sum_of_warp(before), sum_of_warp(all)};
}

struct Range {
  int begin, end;
  __device__ bool has(int i) const { return begin <= i && i < end; }
};

// Calls use(i, from[i]) for range.begin + first and every `step`th i behind; kAhead loads are on their way
// at once.
template <int kAhead, class T, class Use>
__device__ inline void each(const T* from, Range range, int first, int step, Use use) {
#pragma unroll 1
  for (int i = range.begin + first; i < range.end; i += kAhead * step) {
    T values[kAhead];
#pragma unroll
    for (int n = 0; n < kAhead; ++n)
      if (i + n * step < range.end) values[n] = from[i + n * step];
#pragma unroll
    for (int n = 0; n < kAhead; ++n)
      if (i + n * step < range.end) use(i + n * step, values[n]);
  }
}

__device__ inline float score_of(u32 rank) {
  return __uint_as_float(rank >> 31 ? rank & 0x7fffffffu : ~rank);
}

// A row, and what this warp and its CTA have of it.
struct Row {
  Cta* cta;
  int part;
  Range of_cta, of_warp;  // ids
  int vocab;
  float* scores;  // logits first; -infinity where a token is excluded
  float best;     // score

  __device__ double below_best(float score) const { return double(score) - double(best); }
  __device__ static float nothing() { return __uint_as_float(0xff800000u); }

  // Calls use(n, ids[n]) for the ids that this CTA has; then its threads wait for each other.
  template <class Use>
  __device__ void each_id(const int* ids, int begin, int end, Use use) const {
    each<4>(ids, {begin, end}, threadIdx.x, kThreads, [&](int n, int id) {
      if (of_cta.has(id)) use(n, id);
    });
    __syncthreads();
  }

  // Calls use(score) for the scores of this warp, in all lanes at once.
  template <class Use>
  __device__ void each_score(Use use) const {
#pragma unroll 1
    for (int run = of_warp.begin; run < of_warp.end; run += 32) use(at(run + lane()));
  }
  __device__ float at(int i) const { return i < of_warp.end ? scores[i] : nothing(); }
};

// Returns the ids of some parts of a row: each has whole words of a mask.
__device__ inline Range ids_of(int part, int parts, int vocab) {
  int size = 32 * ((vocab + 32 * kParts - 1) / (32 * kParts));
  return {min(part * size, vocab), min((part + parts) * size, vocab)};
}

__device__ inline Row row_of(Cta* cta, int vocab, float* scores) {
  int first = cta_of_cluster() * kWarps, part = first + warp();
  return {cta, part, ids_of(first, kWarps, vocab), ids_of(part, 1, vocab), vocab, scores};
}
