// What becomes of the sums of gemm90.cu: a thread has four neighbouring columns of several rows.
// `begin` says whether any of the columns is to be stored; rows then count from its row.
#pragma once
#include "neighbours.cuh"
#include "slabs.cuh"
#include "types.cuh"

template <class Stored>
struct Sums {  // + bias_n (null for none); rows of n
  const float* bias_n;
  Stored* out_mn;
  int n;
  int columns = 0;
  float bias[4] = {};

  __device__ Sums(const float* bias_n, Stored* out_mn, int n)
      : bias_n(bias_n), out_mn(out_mn), n(n) {}

  __device__ bool begin(int row, int column) {
    out_mn += size_t(row) * n + column;
    columns = n - column;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (bias_n && i < columns) bias[i] = bias_n[column + i];
    return columns > 0;
  }

  __device__ __forceinline__ void store(int row, float a, float b, float c, float d) const {
    float sums[4] = {a + bias[0], b + bias[1], c + bias[2], d + bias[3]};
    store_neighbours(out_mn + size_t(row) * n, sums, columns, n % 4 == 0);
  }
};

__device__ __forceinline__ float silu(float x) {
  // Not `/`, whose rare cases are a call; -0 instead of -1e-36 and less below some -87.
  if constexpr (TERMS > 1) return __fdividef(x, 1 + expf(-x));
  // Within some 2^-22, of which 16 bits show nothing.
  float power, inverse;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * -1.44269504f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1 + power));
  return x * inverse;
}

// silu(gate) * up * GATED_SCALE of two channels, as the next product reads it: n channels, a multiple
// of 64, in slabs of `extent` rows, of each term
struct Gated {
  HALF* out;
  int n, extent;
  HALF* even = nullptr;  // the first row's place, and that of the next, which is swizzled otherwise
  HALF* odd = nullptr;

  __device__ bool begin(int row, int column) {
    even = out + in_slabs(row, column / 2, extent);
    odd = out + in_slabs(row + 1, column / 2, extent) - kSlabK;
    return column / 2 < n;
  }

  // Rows that are eight apart are swizzled alike.
  __device__ __forceinline__ void store(int row, float gate0, float up0, float gate1,
                                        float up1) const {
    float first = silu(gate0) * up0 * GATED_SCALE, second = silu(gate1) * up1 * GATED_SCALE;
    HALF* at = (row % 2 ? odd : even) + row * kSlabK;
#pragma unroll
    for (int term = 0; term < TERMS; ++term) {
      u32 both = HALF::both(first, second);
      *reinterpret_cast<u32*>(at + term * size_t(n) * extent) = both;
      first -= HALF::to_float(HALF{u16(both)});
      second -= HALF::to_float(HALF{u16(both >> 16)});
    }
  }
};
