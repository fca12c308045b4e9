// The gated convolution between ShortConv's two projections, and its state.
// t tokens, h hidden_size, s sequences; KERNEL_SIZE taps.  bcx_t3h holds B, C and X side by side.
// It and the result are of type INNER, the latter as the next product reads it.
// The state holds the newest WINDOW rows of u of each page's own positions: past_pwh is
// [pages, WINDOW, h], and pages_sw names the pages of each sequence, `width` numbers in a row.
#include "dependent.cuh"
#include "sequences.cuh"
#include "slabs.cuh"
#include "types.cuh"
#include "vector.cuh"

constexpr int kPast = KERNEL_SIZE - 1, kRows = ROWS;

// u[row] = B * X of VECTOR channels
__device__ inline Vector gated_input(const INNER* bcx_t3h, size_t row, int h, int channel) {
  const INNER* at = bcx_t3h + row * 3 * h + channel;
  Vector u = load(at), x = load(at + 2 * h);
#pragma unroll
  for (int v = 0; v < VECTOR; ++v) u.of[v] *= x.of[v];
  return u;
}

// Where the row of u of a position is kept.
__device__ inline size_t kept_row(const int* pages, int position, int page_tokens) {
  size_t page = early(pages + position / page_tokens);
  return page * WINDOW + position % page_tokens % WINDOW;
}

// Where a row is in its sequence, and the rows of u before it that the state has.
struct Row {
  int position;
  size_t kept;  // where the state keeps it
  bool has[KERNEL_SIZE];      // never the row itself
  Vector past[KERNEL_SIZE];  // past[j] is kPast - j rows before
};

// Returns a row; nothing of the past without a state, in one forward over whole sequences.
__device__ __forceinline__ Row row_at(int row, int channel, const int* positions_t,
                                      const int* cu_seqlens_s, const int* pages_sw,
                                      const float* past_pwh, int sequences, int width,
                                      int page_tokens, int h) {
  Row its = {early(positions_t + row)};
  if (!past_pwh) return its;
  int sequence = sequence_of(row, cu_seqlens_s, sequences), first = early(cu_seqlens_s + sequence);
  const int* pages = pages_sw + size_t(sequence) * width;
  its.kept = kept_row(pages, its.position, page_tokens);
#pragma unroll
  for (int j = 0; j < kPast; ++j) {
    int before = kPast - j;
    its.has[j] = row - before < first && its.position >= before;
    if (its.has[j])
      its.past[j] = early(reinterpret_cast<const Vector*>(
          past_pwh + kept_row(pages, its.position - before, page_tokens) * h + channel));
  }
  return its;
}

// out[t] = C[t] * (sum_j taps_jh[j] * u[t - kPast + j] + bias_h), in the row's own sequence.
// A thread per kRows rows and VECTOR channels; of the rows before them it computes u anew, or reads
// it from the state (null in one forward over whole sequences) where they come before the chunk.
// If it also `keeps` rows, chunks are no longer than a state can go back: then what it writes
// replaces nothing that another thread reads.  Padding rows, at position -1, see nothing, and are not kept.
//
// In a step, what the batch and the state hold is read before the kernel ahead has ended, the
// projection: what wrote it had ended before that one began.  Several rows would take too many registers.
extern "C" __global__ void convolve(const INNER* bcx_t3h, const float* taps_jh,
                                    const float* bias_h, const int* positions_t,
                                    const int* cu_seqlens_s, const int* pages_sw,
                                    float* past_pwh, INNER* out, int keeps, int sequences,
                                    int width, int page_tokens, int tokens, int h, int extent) {
  int row0 = blockIdx.x * kRows, channel = (blockIdx.y * blockDim.x + threadIdx.x) * VECTOR;
  auto find = [=](int row) {
    return row_at(row, channel, positions_t, cu_seqlens_s, pages_sw, past_pwh, sequences, width,
                  page_tokens, h);
  };
  Row found = {};
  if (kRows == 1 && row0 < tokens && channel < h) found = find(row0);
  Vector taps[KERNEL_SIZE] = {};
#pragma unroll
  for (int j = 0; j < KERNEL_SIZE; ++j)
    if (channel < h) taps[j] = load(taps_jh + j * h + channel);
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
    Row its = kRows == 1 ? found : find(row);
    if (keeps && its.position >= 0) store(past_pwh + its.kept * h + channel, u[i + kPast]);
    Vector y = {};
#pragma unroll
    for (int j = 0; j < KERNEL_SIZE; ++j) {
      if (its.position < kPast - j) continue;
      Vector x = u[i + j];
      if (its.has[j]) x = its.past[j];
#pragma unroll
      for (int v = 0; v < VECTOR; ++v) y.of[v] = fmaf(taps[j].of[v], x.of[v], y.of[v]);
    }
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) {
      if (bias_h) y.of[v] += bias_h[channel + v];
      y.of[v] *= c[i].of[v];
    }
    store(activation_at(out, row, channel, extent), y);
  }
}

// Writes the rows of u that stay in their page: those that no later one of the page replaces.  It runs
// after `convolve` where that keeps none.
// A thread per sequence, page that its chunk reaches, from the page `skipped` on, and VECTOR channels.
extern "C" __global__ void remember(const INNER* __restrict__ bcx_t3h, const int* positions_t,
                                    const int* cu_seqlens_s, const int* pages_sw,
                                    float* __restrict__ past_pwh, int skipped, int width,
                                    int page_tokens, int h) {
  wait_for_previous();
  let_next_start();
  int channel = (blockIdx.y * blockDim.x + threadIdx.x) * VECTOR;
  if (channel >= h) return;
  int first = cu_seqlens_s[blockIdx.x], tokens = cu_seqlens_s[blockIdx.x + 1] - first;
  int start = positions_t[first], column = start / page_tokens + skipped + blockIdx.z;
  int page_start = column * page_tokens;
  int end = min(start + tokens, page_start + page_tokens);
  const int* pages = pages_sw + size_t(blockIdx.x) * width;
#pragma unroll 4
  for (int position = max(max(start, page_start), end - WINDOW); position < end; ++position) {
    Vector u = gated_input(bcx_t3h, first + position - start, h, channel);
    store(past_pwh + kept_row(pages, position, page_tokens) * h + channel, u);
  }
}
