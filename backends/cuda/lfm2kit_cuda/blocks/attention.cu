// Between the projections of attention: norm and rotation of queries and keys, then attention.
// t tokens, s sequences; HEADS query heads share KV_HEADS key/value heads, of HEAD_DIM elements.
// A row of qkv holds all queries, then all keys, then all values.  They, kept keys and values, and
// the result are of type INNER, and the result as the next product reads it; the arithmetic is in
// float32.  Kept keys and values are [pages, page_tokens, KV_HEADS, HEAD_DIM]; pages_sw names the
// pages of each sequence, `width` numbers in a row.
#include "dependent.cuh"
#include "layers.cuh"
#include "reduce.cuh"
#include "sequences.cuh"
#include "slabs.cuh"
#include "types.cuh"

constexpr int kQueries = HEADS * HEAD_DIM, kKeys = KV_HEADS * HEAD_DIM;
constexpr int kRow = kQueries + 2 * kKeys;
constexpr int kHalf = HEAD_DIM / 2;
constexpr int kGroup = HEADS / KV_HEADS;

// x -> x / rms(x) * weight, then (a, b) -> (a cos - b sin, b cos + a sin) by halves, to `to`.
// A warp per head; lane i holds the pairs i, i + 32, ... of the head.
__device__ void norm_and_rotate_head(const INNER* from, INNER* to, const float* weight,
                                     const float* inverse, float position, float eps) {
  constexpr int kPairs = (kHalf + kWarp - 1) / kWarp;
  int lane = threadIdx.x % kWarp;
  float a[kPairs], b[kPairs], squares = 0;
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    int i = lane + p * kWarp;
    a[p] = i < kHalf ? INNER::to_float(from[i]) : 0;
    b[p] = i < kHalf ? INNER::to_float(from[i + kHalf]) : 0;
    squares = fmaf(b[p], b[p], fmaf(a[p], a[p], squares));
  }
  float scale = inverse_rms(warp_sum(squares), HEAD_DIM, eps);
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    int i = lane + p * kWarp;
    if (i >= kHalf) continue;
    float sin, cos;
    sincosf(position * inverse[i], &sin, &cos);
    float x = a[p] * scale * weight[i], y = b[p] * scale * weight[i + kHalf];
    to[i] = INNER::from_float(x * cos - y * sin);
    to[i + kHalf] = INNER::from_float(y * cos + x * sin);
  }
}

// Norms and rotates in place in qkv; with a state, keys and values go to their place in their page
// instead.  A CTA has a row, and each of its warps takes some of the heads.
extern "C" __global__ void norm_and_rotate(INNER* qkv_t, const float* q_weight_d,
                                           const float* k_weight_d, const float* inverse,
                                           const int* positions_t, const int* cu_seqlens_s,
                                           const int* pages_sw, INNER* keys, INNER* values,
                                           int sequences, int width, int page_tokens, float eps) {
  wait_for_previous();
  let_next_start();
  int row = blockIdx.x, position = positions_t[row];
  INNER* qkv = qkv_t + size_t(row) * kRow;
  INNER *new_keys = qkv + kQueries, *new_values = new_keys + kKeys;
  if (keys) {
    const int* pages = pages_sw + size_t(sequence_of(row, cu_seqlens_s, sequences)) * width;
    size_t page = pages[position / page_tokens];
    size_t at = (page * page_tokens + position % page_tokens) * kKeys;
    for (int i = threadIdx.x; i < kKeys; i += blockDim.x) values[at + i] = new_values[i];
    new_keys = keys + at;
  }
  for (int head = threadIdx.x / kWarp; head < HEADS + KV_HEADS; head += blockDim.x / kWarp) {
    bool is_query = head < HEADS;
    INNER* from = qkv + head * HEAD_DIM;
    INNER* to = is_query ? from : new_keys + (head - HEADS) * HEAD_DIM;
    norm_and_rotate_head(from, to, is_query ? q_weight_d : k_weight_d, inverse, position, eps);
  }
}

// Flash attention in float32: keys pass by in tiles of 32, in order from the sequence's first, so
// that a row's bits depend on nothing but its own past.  A CTA takes kRows rows of one sequence
// with the query heads of one key head; a warp takes some of these (row, head) pairs and steps
// through a tile with all of them at once, so that what it reads of a key or value serves all: lane
// j scores key j, then lane d sums element d of the values.
constexpr int kThreads = ATTEND_THREADS, kTile = 32, kWarps = kThreads / kWarp;
constexpr int kRows = kGroup >= MOST_ROWS ? 1 : MOST_ROWS / kGroup;
constexpr int kPairs = kRows * kGroup;
constexpr int kDims = (HEAD_DIM + kWarp - 1) / kWarp;
constexpr int kPairsOfWarp = (kPairs + kWarps - 1) / kWarps;
constexpr int kPart = HEAD_DIM % 4 == 0 ? 4 : 1;  // elements that are read at once
constexpr int kPadded = HEAD_DIM + kPart;         // keeps the lanes' keys in different banks

struct alignas(4 * kPart) Part {
  float of[kPart];
};
__device__ inline const Part& part_at(const float* at) {
  return *reinterpret_cast<const Part*>(at);
}
struct alignas(sizeof(INNER) * kPart) InnerPart {
  INNER of[kPart];
};
__device__ inline void copy_part(float* to, const INNER* from) {
  InnerPart part = *reinterpret_cast<const InnerPart*>(from);
  Part wide;
#pragma unroll
  for (int i = 0; i < kPart; ++i) wide.of[i] = INNER::to_float(part.of[i]);
  *reinterpret_cast<Part*>(to) = wide;
}

// What a CTA has in shared memory.
struct alignas(16) Shared {
  float queries[kPairs][HEAD_DIM], keys[kTile][kPadded], values[kTile][HEAD_DIM];
  float weights[kWarps][kTile][kPairsOfWarp];
};

// The keys and values of one key head, rows `stride` apart.
struct Past {
  const INNER *keys, *values;
  size_t stride;
};

// Where a sequence's keys are among all of them: in its pages, or without a state in its own rows.
struct Pages {
  const int* numbers;  // null without a state
  int page_tokens;

  // The row of a tile's first key.  A page holds whole tiles, so the others follow it.  To count
  // along with the keys, instead of a division for 32 of them, takes 16 registers more on Hopper.
  __device__ int row_of(int key0) const {
    return numbers ? numbers[key0 / page_tokens] * page_tokens + key0 % page_tokens : key0;
  }
};

// Copies `count` keys and values, from a row on, to shared memory.
__device__ inline void load_tile(Shared& shared, const Past& past, int row, int count) {
  for (int i = threadIdx.x; i < count * HEAD_DIM / kPart; i += kThreads) {
    int j = i / (HEAD_DIM / kPart), d = i % (HEAD_DIM / kPart) * kPart;
    size_t at = size_t(row + j) * past.stride + d;
    copy_part(&shared.keys[j][d], past.keys + at);
    copy_part(&shared.values[j][d], past.values + at);
  }
}

// What a warp has summed for kMine pairs so far: softmax's maximum and sum, and the weighted values.
template <int kMine>
struct Sums {
  float most[kMine], total[kMine], of[kMine][kDims];
};

// score[p] = query of pair p . key of this lane; pair p of a warp is pair warp + p * kWarps.
template <int kMine>
__device__ inline void score_keys(const Shared& shared, float (&score)[kMine]) {
  int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll 4
  for (int d = 0; d < HEAD_DIM; d += kPart) {
    Part key = part_at(&shared.keys[lane][d]);
#pragma unroll
    for (int p = 0; p < kMine; ++p) {
      Part query = part_at(&shared.queries[min(warp + p * kWarps, kPairs - 1)][d]);
#pragma unroll
      for (int i = 0; i < kPart; ++i) score[p] = fmaf(query.of[i], key.of[i], score[p]);
    }
  }
}

// Adds the weighted values of keys begin to end.  Where not all pairs see all of them, those that do
// not must add nothing: not 0 times a value, which may not be finite.
template <bool kAllSee, int kMine>
__device__ inline void add_values(const Shared& shared, Sums<kMine>& sums, const int (&seen)[kMine],
                                  int begin, int end) {
  int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int j = begin; j < end; ++j) {
    float value[kDims];
#pragma unroll
    for (int i = 0; i < kDims; ++i)
      value[i] = lane + i * kWarp < HEAD_DIM ? shared.values[j][lane + i * kWarp] : 0;
#pragma unroll
    for (int p = 0; p < kMine; ++p) {
      if (!kAllSee && j >= seen[p]) continue;
#pragma unroll
      for (int i = 0; i < kDims; ++i)
        sums.of[p][i] = fmaf(shared.weights[warp][j][p], value[i], sums.of[p][i]);
    }
  }
}

// Adds a tile of which pair p sees the first seen[p] keys.
template <int kMine>
__device__ inline void add_tile(Shared& shared, Sums<kMine>& sums, const int (&seen)[kMine],
                                float scale) {
  int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int least_seen = kTile, most_seen = 0;
  float score[kMine] = {};
  score_keys(shared, score);
#pragma unroll
  for (int p = 0; p < kMine; ++p) {
    bool is_seen = lane < seen[p];
    float scaled = is_seen ? score[p] * scale : -infinity();
    float now = fmaxf(sums.most[p], warp_max(scaled));
    float weight = is_seen ? expf(scaled - now) : 0;
    float fade = seen[p] > 0 ? expf(sums.most[p] - now) : 1;
    shared.weights[warp][lane][p] = weight;
    sums.most[p] = now;
    sums.total[p] = sums.total[p] * fade + warp_sum(weight);
#pragma unroll
    for (int i = 0; i < kDims; ++i) sums.of[p][i] *= fade;
    least_seen = min(least_seen, seen[p]);
    most_seen = max(most_seen, seen[p]);
  }
  __syncwarp();
  add_values<true>(shared, sums, seen, 0, least_seen);
  add_values<false>(shared, sums, seen, max(least_seen, 0), most_seen);
}

// Where a CTA stores its heads: the first pair's row and element.
struct Heads {
  INNER* all;
  int row, element, extent;
};

// Computes and stores the attention of `pairs` pairs, kMine per warp; positions_r[pair / kGroup] is the
// position of a pair's row.
template <int kMine>
__device__ inline void attend_pairs(Shared& shared, const Past& past, Pages pages,
                                    const int* positions_r, int pairs, const Heads& heads,
                                    float scale) {
  int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  Sums<kMine> sums = {};
  int context[kMine];  // keys that a pair sees
#pragma unroll
  for (int p = 0; p < kMine; ++p) {
    int pair = warp + p * kWarps;
    sums.most[p] = -infinity();
    context[p] = pair < pairs ? positions_r[pair / kGroup] + 1 : 0;
  }
  int longest = positions_r[(pairs - 1) / kGroup] + 1;
  for (int key0 = 0; key0 < longest; key0 += kTile) {
    int count = min(kTile, longest - key0), seen[kMine];
    __syncthreads();
    load_tile(shared, past, pages.row_of(key0), count);
    __syncthreads();
#pragma unroll
    for (int p = 0; p < kMine; ++p) seen[p] = min(count, context[p] - key0);
    add_tile(shared, sums, seen, scale);
  }
#pragma unroll
  for (int p = 0; p < kMine; ++p) {
    int pair = warp + p * kWarps;
    if (pair >= pairs) continue;
    int row = heads.row + pair / kGroup, first = heads.element + pair % kGroup * HEAD_DIM;
#pragma unroll
    for (int i = 0; i < kDims; ++i)
      if (lane + i * kWarp < HEAD_DIM)
        *activation_at(heads.all, row, first + lane + i * kWarp, heads.extent) =
            INNER::from_float(sums.of[p][i] / sums.total[p]);
  }
}

// CTAs are (rows of a sequence, sequence, key head): layers of sequences for each key head.
extern "C" __global__ void __launch_bounds__(kThreads)
    attend(const INNER* qkv_t, const INNER* keys, const INNER* values, const int* positions_t,
           const int* cu_seqlens_s, const int* pages_sw, INNER* out, int extent, int sequences,
           int width, int page_tokens, float scale) {
  __shared__ Shared shared;
  wait_for_previous();
  let_next_start();
  int sequence = number_in_layers(blockIdx.z / KV_HEADS), kv_head = blockIdx.z % KV_HEADS;
  if (sequence >= sequences) return;
  int first = cu_seqlens_s[sequence], end = cu_seqlens_s[sequence + 1];
  int row0 = first + blockIdx.x * kRows;
  if (row0 >= end) return;
  int pairs = min(kRows, end - row0) * kGroup;
  const INNER* queries = qkv_t + size_t(row0) * kRow + kv_head * kGroup * HEAD_DIM;
  for (int i = threadIdx.x; i < pairs * HEAD_DIM / kPart; i += kThreads) {
    int pair = i / (HEAD_DIM / kPart), d = i % (HEAD_DIM / kPart) * kPart;
    copy_part(&shared.queries[pair][d],
              queries + size_t(pair / kGroup) * kRow + pair % kGroup * HEAD_DIM + d);
  }
  Past past{qkv_t + size_t(first) * kRow + kQueries, nullptr, kRow};
  past.values = past.keys + kKeys;
  if (keys) past = Past{keys, values, kKeys};
  past.keys += kv_head * HEAD_DIM;
  past.values += kv_head * HEAD_DIM;
  Pages pages{keys ? pages_sw + size_t(sequence) * width : nullptr, page_tokens};
  Heads heads{out, row0, kv_head * kGroup * HEAD_DIM, extent};
  const int* positions_r = positions_t + row0;
  if (pairs <= kWarps) attend_pairs<1>(shared, past, pages, positions_r, pairs, heads, scale);
  else attend_pairs<kPairsOfWarp>(shared, past, pages, positions_r, pairs, heads, scale);
}
