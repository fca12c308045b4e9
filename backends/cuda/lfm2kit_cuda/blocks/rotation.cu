// Between the projections of attention, first: norm and rotation of queries and keys (heads.cuh).
// t tokens, s sequences.  Elements are of type INNER; the arithmetic is in float32.  Kept keys and
// values are [pages, page_tokens, KV_HEADS, HEAD_DIM]; pages_sw names the pages of each sequence,
// `width` numbers in a row.
#include "dependent.cuh"
#include "heads.cuh"
#include "reduce.cuh"
#include "sequences.cuh"
#include "types.cuh"

constexpr int kHalf = HEAD_DIM / 2;

// x -> x / rms(x) * weight, then (a, b) -> (a cos - b sin, b cos + a sin) by halves, to `to`.
// A warp per head; lane i holds the pairs i, i + 32, ... of the head.
__device__ void norm_and_rotate_head(const INNER* from, INNER* to, const float* weight,
                                     const float* inverse, float position, float eps) {
  constexpr int kOfLane = (kHalf + kWarp - 1) / kWarp;
  int lane = threadIdx.x % kWarp;
  float a[kOfLane], b[kOfLane], squares = 0;
#pragma unroll
  for (int p = 0; p < kOfLane; ++p) {
    int i = lane + p * kWarp;
    a[p] = i < kHalf ? INNER::to_float(from[i]) : 0;
    b[p] = i < kHalf ? INNER::to_float(from[i + kHalf]) : 0;
    squares = fmaf(b[p], b[p], fmaf(a[p], a[p], squares));
  }
  float scale = inverse_rms(warp_sum(squares), HEAD_DIM, eps);
#pragma unroll
  for (int p = 0; p < kOfLane; ++p) {
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
