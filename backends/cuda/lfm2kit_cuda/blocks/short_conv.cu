// The gated convolution between ShortConv's two projections, and its state.
// t tokens, h hidden_size, s sequences; KERNEL_SIZE taps.  bcx_t3h holds B, C and X side by side.
// It and the result are of type INNER, the latter as the next product reads it.
#include "dependent.cuh"
#include "sequences.cuh"
#include "slabs.cuh"
#include "types.cuh"
#include "vector.cuh"

constexpr int kPast = KERNEL_SIZE - 1, kRows = 4;

// u[row] = B * X of VECTOR channels
__device__ inline Vector gated_input(const INNER* bcx_t3h, size_t row, int h, int channel) {
  const INNER* at = bcx_t3h + row * 3 * h + channel;
  Vector u = load(at), x = load(at + 2 * h);
#pragma unroll
  for (int v = 0; v < VECTOR; ++v) u.of[v] *= x.of[v];
  return u;
}

// out[t] = C[t] * (sum_j taps_jh[j] * u[t - kPast + j] + bias_h), in the row's own sequence.
// A thread per kRows rows and VECTOR channels; of the rows before them it computes u anew.
// `past_sph` (null in one forward over whole sequences) holds the newest kPast rows of u of every
// slot.
extern "C" __global__ void convolve(const INNER* bcx_t3h, const float* taps_jh,
                                    const float* bias_h, const int* positions_t,
                                    const int* cu_seqlens_s, const int* state_slots_s,
                                    const float* past_sph, INNER* out, int sequences, int tokens,
                                    int h, int extent) {
  int row0 = blockIdx.x * kRows, channel = (blockIdx.y * blockDim.x + threadIdx.x) * VECTOR;
  wait_for_previous();
  let_next_start();
  if (channel >= h) return;
  Vector u[kPast + kRows] = {}, c[kRows] = {};  // u[i] is that of row0 - kPast + i
#pragma unroll
  for (int i = 0; i < kPast + kRows; ++i) {
    int row = row0 - kPast + i;
    if (row >= 0 && row < tokens) u[i] = gated_input(bcx_t3h, row, h, channel);
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i)
    if (row0 + i < tokens) c[i] = load(bcx_t3h + (size_t(row0 + i) * 3 + 1) * h + channel);
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    int row = row0 + i;
    if (row >= tokens) return;
    int position = positions_t[row], first = 0;
    const float* past_ph = nullptr;
    if (past_sph) {
      int sequence = sequence_of(row, cu_seqlens_s, sequences);
      first = cu_seqlens_s[sequence];
      past_ph = past_sph + size_t(state_slots_s[sequence]) * kPast * h + channel;
    }
    Vector y = {};
#pragma unroll
    for (int j = 0; j < KERNEL_SIZE; ++j) {
      int before = kPast - j;
      if (position < before) continue;
      Vector tap = load(taps_jh + j * h + channel), its = u[i + j];
      if (past_sph && row - before < first) its = load(past_ph + (row - before - first + kPast) * h);
#pragma unroll
      for (int v = 0; v < VECTOR; ++v) y.of[v] = fmaf(tap.of[v], its.of[v], y.of[v]);
    }
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) {
      if (bias_h) y.of[v] += bias_h[channel + v];
      y.of[v] *= c[i].of[v];
    }
    store(activation_at(out, row, channel, extent), y);
  }
}

// Leaves the newest kPast rows of u in each sequence's slot, moving older ones up.
// A thread per sequence and VECTOR channels, so that it reads each row before it writes it.
extern "C" __global__ void remember(const INNER* bcx_t3h, const int* cu_seqlens_s,
                                    const int* state_slots_s, float* past_sph, int h) {
  wait_for_previous();
  let_next_start();
  int channel = (blockIdx.y * blockDim.x + threadIdx.x) * VECTOR;
  if (channel >= h) return;
  int first = cu_seqlens_s[blockIdx.x], end = cu_seqlens_s[blockIdx.x + 1];
  float* slot = past_sph + size_t(state_slots_s[blockIdx.x]) * kPast * h + channel;
  for (int i = 0; i < kPast; ++i) {
    int row = end - kPast + i;
    Vector u = row >= first ? gated_input(bcx_t3h, row, h, channel)
                            : load(slot + size_t(i + end - first) * h);
    store(slot + size_t(i) * h, u);
  }
}
