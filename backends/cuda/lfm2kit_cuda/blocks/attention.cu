// Between the projections of attention: norm and rotation of queries and keys, then attention.
// t tokens, s sequences; HEADS query heads share KV_HEADS key/value heads, of HEAD_DIM elements.
// A row of qkv holds all queries, then all keys, then all values.
#include "dependent.cuh"
#include "reduce.cuh"
#include "sequences.cuh"
#include "types.cuh"

constexpr int kQueries = HEADS * HEAD_DIM, kKeys = KV_HEADS * HEAD_DIM;
constexpr int kRow = kQueries + 2 * kKeys;
constexpr int kHalf = HEAD_DIM / 2;
constexpr int kGroup = HEADS / KV_HEADS;

// x -> x / rms(x) * weight, then (a, b) -> (a cos - b sin, b cos + a sin) by halves, to `to`.
// A warp per head; lane i holds the pairs i, i + 32, ... of the head.
__device__ void norm_and_rotate_head(const float* from, float* to, const float* weight,
                                     const float* inverse, float position, float eps) {
  constexpr int kPairs = (kHalf + kWarp - 1) / kWarp;
  int lane = threadIdx.x % kWarp;
  float a[kPairs], b[kPairs], squares = 0;
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    int i = lane + p * kWarp;
    a[p] = i < kHalf ? from[i] : 0;
    b[p] = i < kHalf ? from[i + kHalf] : 0;
    squares = fmaf(b[p], b[p], fmaf(a[p], a[p], squares));
  }
  float scale = 1 / sqrtf(warp_sum(squares) / HEAD_DIM + eps);
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    int i = lane + p * kWarp;
    if (i >= kHalf) continue;
    float sin, cos;
    sincosf(position * inverse[i], &sin, &cos);
    float x = a[p] * scale * weight[i], y = b[p] * scale * weight[i + kHalf];
    to[i] = x * cos - y * sin;
    to[i + kHalf] = y * cos + x * sin;
  }
}

// In place in qkv; keys and values go to their slot's cache instead, where there is one.
// A block per row, its warps share out the heads.
extern "C" __global__ void norm_and_rotate(float* qkv_t, const float* q_weight_d,
                                           const float* k_weight_d, const float* inverse,
                                           const int* positions_t, const int* cu_seqlens_s,
                                           const int* state_slots_s, float* keys, float* values,
                                           int sequences, int max_tokens, float eps) {
  wait_for_previous();
  int row = blockIdx.x, position = positions_t[row];
  float* qkv = qkv_t + size_t(row) * kRow;
  float *new_keys = qkv + kQueries, *new_values = new_keys + kKeys;
  if (keys) {
    int slot = state_slots_s[sequence_of(row, cu_seqlens_s, sequences)];
    size_t at = (size_t(slot) * max_tokens + position) * kKeys;
    for (int i = threadIdx.x; i < kKeys; i += blockDim.x) values[at + i] = new_values[i];
    new_keys = keys + at;
  }
  for (int head = threadIdx.x / kWarp; head < HEADS + KV_HEADS; head += blockDim.x / kWarp) {
    bool is_query = head < HEADS;
    float* from = qkv + head * HEAD_DIM;
    float* to = is_query ? from : new_keys + (head - HEADS) * HEAD_DIM;
    norm_and_rotate_head(from, to, is_query ? q_weight_d : k_weight_d, inverse, position, eps);
  }
}

// Flash attention in float32: keys pass by in tiles of 32, in order from the sequence's first, so
// that a row's bits depend on nothing but its own past.  A block takes kRows rows of one sequence
// with the query heads of one key head; a warp takes (row, head) pairs in turn; in a pair, lane j
// scores key j of the tile, then lane d sums element d of the values.  The result is of type OUT,
// as the next product reads it, in rows `width` apart.
constexpr int kThreads = 128, kTile = 32;
constexpr int kRows = kGroup >= 16 ? 1 : 16 / kGroup;
constexpr int kPairs = kRows * kGroup;
constexpr int kPadded = HEAD_DIM + 1;  // keeps the lanes' keys in different banks
constexpr int kDims = (HEAD_DIM + kWarp - 1) / kWarp;
constexpr int kPairsOfWarp = (kPairs + kThreads / kWarp - 1) / (kThreads / kWarp);

extern "C" __global__ void __launch_bounds__(kThreads)
    attend(const float* qkv_t, const float* keys, const float* values, const int* positions_t,
           const int* cu_seqlens_s, const int* state_slots_s, OUT* out_t, int width,
           int max_tokens, float scale) {
  __shared__ float tile_keys[kTile * kPadded], tile_values[kTile * HEAD_DIM];
  wait_for_previous();
  int sequence = blockIdx.y, kv_head = blockIdx.z;
  int end = cu_seqlens_s[sequence + 1];
  int row0 = cu_seqlens_s[sequence] + blockIdx.x * kRows;
  if (row0 >= end) return;
  int rows = min(kRows, end - row0);
  size_t first = 0, stride = kKeys;  // of the sequence's first key
  if (keys) {
    first = size_t(state_slots_s[sequence]) * max_tokens;
  } else {
    keys = qkv_t + kQueries;
    values = keys + kKeys;
    first = cu_seqlens_s[sequence];
    stride = kRow;
  }
  int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  float query[kPairsOfWarp][kDims], most[kPairsOfWarp], total[kPairsOfWarp];
  float sum[kPairsOfWarp][kDims];
#pragma unroll
  for (int p = 0; p < kPairsOfWarp; ++p) {
    int pair = warp + p * (kThreads / kWarp);
    int row = row0 + min(pair / kGroup, rows - 1), head = kv_head * kGroup + pair % kGroup;
    most[p] = -infinity();
    total[p] = 0;
#pragma unroll
    for (int d = 0; d < kDims; ++d) {
      int i = lane + d * kWarp;
      query[p][d] = i < HEAD_DIM ? qkv_t[size_t(row) * kRow + head * HEAD_DIM + i] : 0;
      sum[p][d] = 0;
    }
  }
  int context = positions_t[row0 + rows - 1] + 1;
  for (int key0 = 0; key0 < context; key0 += kTile) {
    int count = min(kTile, context - key0);
    __syncthreads();
    for (int i = threadIdx.x; i < count * HEAD_DIM; i += kThreads) {
      int j = i / HEAD_DIM, d = i % HEAD_DIM;
      size_t at = (first + key0 + j) * stride + kv_head * HEAD_DIM + d;
      tile_keys[j * kPadded + d] = keys[at];
      tile_values[j * HEAD_DIM + d] = values[at];
    }
    __syncthreads();
#pragma unroll
    for (int p = 0; p < kPairsOfWarp; ++p) {
      int pair = warp + p * (kThreads / kWarp);
      if (pair >= rows * kGroup) continue;
      int seen = min(count, positions_t[row0 + pair / kGroup] + 1 - key0);
      if (seen <= 0) continue;
      float score = 0;
#pragma unroll
      for (int d = 0; d < HEAD_DIM; ++d) {
        float q = __shfl_sync(~0u, query[p][d / kWarp], d % kWarp);
        score = fmaf(q, tile_keys[lane * kPadded + d], score);
      }
      score = lane < seen ? score * scale : -infinity();
      float now = fmaxf(most[p], warp_max(score));
      float weight = lane < seen ? expf(score - now) : 0, fade = expf(most[p] - now);
      most[p] = now;
      total[p] = total[p] * fade + warp_sum(weight);
#pragma unroll
      for (int d = 0; d < kDims; ++d) sum[p][d] *= fade;
      for (int j = 0; j < seen; ++j) {
        float w = __shfl_sync(~0u, weight, j);
#pragma unroll
        for (int d = 0; d < kDims; ++d) {
          int i = lane + d * kWarp;
          if (i < HEAD_DIM) sum[p][d] = fmaf(w, tile_values[j * HEAD_DIM + i], sum[p][d]);
        }
      }
    }
  }
#pragma unroll
  for (int p = 0; p < kPairsOfWarp; ++p) {
    int pair = warp + p * (kThreads / kWarp);
    if (pair >= rows * kGroup) continue;
    OUT* out = out_t + size_t(row0 + pair / kGroup) * width
               + (kv_head * kGroup + pair % kGroup) * HEAD_DIM;
#pragma unroll
    for (int d = 0; d < kDims; ++d)
      if (lane + d * kWarp < HEAD_DIM)
        out[lane + d * kWarp] = OUT::from_float(sum[p][d] / total[p]);
  }
}
