// The kernels of gemm16.cu, made of its `compute`; kCtas of their CTAs share an SM.
#pragma once
#include "epilogue16.cuh"

// out_mn = A @ W.T + bias_n (null for none), as `Stored`
#define LINEAR(name, Stored)                                                                      \
  extern "C" __global__ void __launch_bounds__(kThreads, kCtas)                                 \
      name(const HALF* a, const HALF* w_gnk, const float* bias_n, Stored* out_mn,                 \
           const int4* tiles, const int* tile_count, int tile_rows, int m, int extent, int k,     \
           int width, int n) {                                                                    \
    compute(a, extent, w_gnk, tiles, tile_count, tile_rows, m, k, width,                          \
            [=](int row, int column, const float* first, const float* second) {                   \
              store_sums(out_mn + size_t(row) * n, column, n, bias_n, first);                     \
              store_sums(out_mn + size_t(row) * n, column + 8, n, bias_n, second);                \
            });                                                                                   \
  }
LINEAR(linear_mma, F32)
LINEAR(linear_rounded_mma, HALF)

// out = silu(A @ w1.T) * (A @ w3.T) * GATED_SCALE, in slabs of the same extent; n is a multiple of 64.
extern "C" __global__ void __launch_bounds__(kThreads, kCtas)
    gated_mma(const HALF* a, const HALF* w_gnk, HALF* out, const int4* tiles,
              const int* tile_count, int tile_rows, int m, int extent, int k, int width, int n) {
  compute(a, extent, w_gnk, tiles, tile_count, tile_rows, m, k, width,
          [=](int row, int column, const float* gate, const float* up) {
            int c = column / 16 * 8 + column % 8;
            if (c < n) store_gated(out + in_slabs(row, c, extent), gate, up);
          });
}
