// The blocks that look at each row alone: embedding, norm, last rows.  t tokens, h hidden_size.
#include "dependent.cuh"
#include "reduce.cuh"
#include "slabs.cuh"
#include "types.cuh"
#include "vector.cuh"

// out_th[t] = table_vh[token_ids_t[t]], widened; zeros in padding rows, whose ids may be any numbers.
// A CTA per token.
template <class Stored>
__device__ void embed(const Stored* table_vh, const int* token_ids_t, const int* positions_t,
                      float* out_th, int h) {
  wait_for_previous();
  let_next_start();
  bool is_padding = positions_t[blockIdx.x] < 0;
  const Stored* row = table_vh + size_t(is_padding ? 0 : token_ids_t[blockIdx.x]) * h;
  float* out = out_th + size_t(blockIdx.x) * h;
  for (int i = threadIdx.x; i < h; i += blockDim.x)
    out[i] = is_padding ? 0 : Stored::to_float(row[i]);
}

#define EMBED(Stored)                                                                             \
  extern "C" __global__ void embed_##Stored(const Stored* table_vh, const int* token_ids_t,       \
                                            const int* positions_t, float* out_th, int h) {       \
    embed(table_vh, token_ids_t, positions_t, out_th, h);                                         \
  }
EMBED(F32)
EMBED(BF16)
EMBED(F16)

// hidden_th += delta_th (unless delta_th is null); x_th = hidden / rms(hidden) * weight_h, and the
// same as the next product reads it, of type OUT and the given extent; either may be null.
// A CTA per row of HIDDEN elements, VECTOR at a time; a thread keeps its own in registers.  The
// sum of squares is added in an order that depends on HIDDEN alone.
constexpr int kThreads = NORM_THREADS, kStep = kThreads * VECTOR;
constexpr int kParts = (HIDDEN + kStep - 1) / kStep;

extern "C" __global__ void __launch_bounds__(kThreads)
    add_norm(float* hidden_th, const float* delta_th, const float* weight_h, float* x_th,
             OUT* rounded, int extent, float eps) {
  __shared__ float sums[kThreads / kWarp];
  size_t row = size_t(blockIdx.x) * HIDDEN;
  Vector values[kParts] = {}, weights[kParts];
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
    int i = p * kStep + threadIdx.x * VECTOR;
    if (i < HIDDEN) weights[p] = load(weight_h + i);
  }
  wait_for_previous();
  let_next_start();
  float squares = 0;
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
    int i = p * kStep + threadIdx.x * VECTOR;
    if (i < HIDDEN) values[p] = load(hidden_th + row + i);
    if (i < HIDDEN && delta_th) {
      Vector delta = load(delta_th + row + i);
      for (int v = 0; v < VECTOR; ++v) values[p].of[v] += delta.of[v];
      store(hidden_th + row + i, values[p]);
    }
    for (int v = 0; v < VECTOR; ++v) squares = fmaf(values[p].of[v], values[p].of[v], squares);
  }
  float scale = inverse_rms(cta_sum<kThreads>(squares, sums), HIDDEN, eps);
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
    int i = p * kStep + threadIdx.x * VECTOR;
    if (i >= HIDDEN) continue;
    Vector x = weights[p];
    for (int v = 0; v < VECTOR; ++v) x.of[v] *= values[p].of[v] * scale;
    if (x_th) store(x_th + row + i, x);
    if (rounded) store(activation_at(rounded, blockIdx.x, i, extent), x);
  }
}

// Copies the rows `rows_l` of two arrays; a CTA per row.
extern "C" __global__ void last_rows(const float* hidden_th, const float* delta_th,
                                     const int* rows_l, float* hidden_lh, float* delta_lh, int h) {
  wait_for_previous();
  let_next_start();
  size_t from = size_t(rows_l[blockIdx.x]) * h, to = size_t(blockIdx.x) * h;
  for (int i = threadIdx.x * VECTOR; i < h; i += blockDim.x * VECTOR) {
    store(hidden_lh + to + i, load(hidden_th + from + i));
    store(delta_lh + to + i, load(delta_th + from + i));
  }
}
