// Between the projections of attention, first: norm and rotation of queries and keys (heads.cuh).
// t tokens, s sequences.  Elements are of type INNER; the arithmetic is in float32.  Kept keys and
// values are [pages, page_tokens, KV_HEADS, HEAD_DIM]; pages_sw names the pages of each sequence,
// `width` numbers in a row.
#include "dependent.cuh"
#include "heads.cuh"
#include "reduce.cuh"
#include "sequences.cuh"
#include "types.cuh"

constexpr int kHalf = HEAD_DIM / 2, kOfLane = (kHalf + kWarp - 1) / kWarp;

// The p-th pair of this lane is that of elements `pair` and `pair` + kHalf; from kHalf on there is none.
__device__ inline int pair_of_lane(int p) { return threadIdx.x % kWarp + p * kWarp; }

// What a lane has of a head, or of the weights for one.
template <class Stored>
struct Lane {
  Stored a[kOfLane] = {}, b[kOfLane] = {};

  __device__ explicit Lane(const Stored* head) {
#pragma unroll
    for (int p = 0; p < kOfLane; ++p)
      if (int i = pair_of_lane(p); i < kHalf) a[p] = head[i], b[p] = head[i + kHalf];
  }

  __device__ void store(Stored* head) const {
#pragma unroll
    for (int p = 0; p < kOfLane; ++p)
      if (int i = pair_of_lane(p); i < kHalf) head[i] = a[p], head[i + kHalf] = b[p];
  }
};

// What a lane multiplies its pairs with: the norm's weights, and the angles of one position.
struct Factors {
  Lane<float> weight;
  float angle[kOfLane] = {};

  __device__ Factors(const float* weight_d, const float* inverse) : weight(weight_d) {
#pragma unroll
    for (int p = 0; p < kOfLane; ++p)
      if (int i = pair_of_lane(p); i < kHalf) angle[p] = inverse[i];
  }
};

// x -> x / rms(x) * weight, then (a, b) -> (a cos - b sin, b cos + a sin) by halves, with a warp.
__device__ inline void norm_and_rotate_head(Lane<INNER>& head, const Factors& factors,
                                            float position, float eps) {
  float a[kOfLane], b[kOfLane], sin[kOfLane], cos[kOfLane], squares = 0;
#pragma unroll
  for (int p = 0; p < kOfLane; ++p) {
    sincosf(position * factors.angle[p], &sin[p], &cos[p]);
    a[p] = INNER::to_float(head.a[p]), b[p] = INNER::to_float(head.b[p]);
    squares = fmaf(b[p], b[p], fmaf(a[p], a[p], squares));
  }
  float scale = inverse_rms(warp_sum(squares), HEAD_DIM, eps);
#pragma unroll
  for (int p = 0; p < kOfLane; ++p) {
    float x = a[p] * scale * factors.weight.a[p], y = b[p] * scale * factors.weight.b[p];
    head.a[p] = INNER::from_float(fmaf(x, cos[p], -__fmul_rn(y, sin[p])));
    head.b[p] = INNER::from_float(fmaf(x, sin[p], __fmul_rn(y, cos[p])));
  }
}

// Norms and rotates in place in qkv; with a state, keys and values go to their place in their page
// instead.  A warp has a head, so that no load waits for another head's.  Weights are loaded first,
// since they may come from far.
extern "C" __global__ void norm_and_rotate(INNER* qkv_t, const float* q_weight_d,
                                           const float* k_weight_d, const float* inverse,
                                           const int* positions_t, const int* cu_seqlens_s,
                                           const int* pages_sw, INNER* keys, INNER* values,
                                           int sequences, int width, int page_tokens, float eps) {
  int row = blockIdx.x, head = (blockIdx.y * blockDim.x + threadIdx.x) / kWarp;
  bool is_query = head < HEADS, is_value = head >= HEADS + KV_HEADS;
  Factors factors(is_query ? q_weight_d : k_weight_d, inverse);
  wait_for_previous();
  let_next_start();
  if (head >= HEADS + 2 * KV_HEADS || is_value && !keys) return;
  INNER* to = qkv_t + size_t(row) * kRow + head * HEAD_DIM;
  Lane<INNER> mine(to);
  int position = positions_t[row];
  if (position < 0) return;  // a padding row
  if (keys && !is_query) {
    const int* pages = pages_sw + size_t(sequence_of(row, cu_seqlens_s, sequences)) * width;
    size_t kept = size_t(pages[position / page_tokens]) * page_tokens + position % page_tokens;
    to = (is_value ? values : keys) + kept * kKeys + (head - HEADS) % KV_HEADS * HEAD_DIM;
  }
  if (!is_value) norm_and_rotate_head(mine, factors, position, eps);
  mine.store(to);
}
