// What becomes of the sums of gemm90.cu, where a thread has four neighbouring columns of several rows, and
// of those of few_rows90.cu, where it has two.
//
// For gemm90.cu `begin` says whether any of the columns is to be stored, `are_whole` whether all four always are;
// `result` is what four sums come to, and `put` stores it, in a row counted from the first.
#pragma once
#include "approximate.cuh"
#include "neighbours.cuh"
#include "slabs.cuh"
#include "types.cuh"

template <class Stored>
struct Linear {  // + bias_n (null for none); rows of n
  using Result = Neighbours<Stored, 4>;
  const float* bias_n;
  Stored* out_mn;
  int n;
  int columns = 0;
  float bias[4] = {};

  __device__ Linear(const float* bias_n, Stored* out_mn, int n)
      : bias_n(bias_n), out_mn(out_mn), n(n) {}

  __device__ bool begin(int row, int column) {
    out_mn += size_t(row) * n + column;
    columns = n - column;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (bias_n && i < columns) bias[i] = bias_n[column + i];
    return columns > 0;
  }

  __device__ __forceinline__ Result result(float a, float b, float c, float d) const {
    const float sums[] = {a + bias[0], b + bias[1], c + bias[2], d + bias[3]};
    return Result(sums);
  }

  __device__ bool are_whole() const { return n % 4 == 0; }

  template <bool are_whole>
  __device__ __forceinline__ void put(int row, const Result& result) const {
    store_neighbours(out_mn + row * n, result, columns, are_whole);
  }
};

__device__ __forceinline__ float silu(float x) {
  // Not `/`, whose rare cases are a call; -0 instead of -1e-36 and less below some -87.
  if constexpr (TERMS > 1) return __fdividef(x, 1 + expf(-x));
  // Within some 2^-22, of which 16 bits show nothing.
  return x * approximate_reciprocal(1 + approximate_power_of_2(x * -1.44269504f));
}

__device__ __forceinline__ float gated(float gate, float up) {
  return silu(gate) * up * GATED_SCALE;
}

// silu(gate) * up * GATED_SCALE of two channels, as the next product reads it: n channels, a multiple
// of 64, in slabs of `extent` rows, of each term
struct Gated {
  struct Result {
    u32 of[TERMS];  // two channels each
  };
  HALF* out;
  int n, extent;
  HALF* even = nullptr;  // the first row's place, and that of the next, which is swizzled otherwise
  HALF* odd = nullptr;

  __device__ bool begin(int row, int column) {
    even = out + in_slabs(row, column / 2, extent);
    odd = out + in_slabs(row + 1, column / 2, extent) - kSlabK;
    return column / 2 < n;
  }

  __device__ __forceinline__ Result result(float gate0, float up0, float gate1, float up1) const {
    float first = gated(gate0, up0), second = gated(gate1, up1);
    Result result;
#pragma unroll
    for (int term = 0; term < TERMS; ++term) {
      u32 both = result.of[term] = HALF::both(first, second);
      first -= HALF::to_float(HALF{u16(both)});
      second -= HALF::to_float(HALF{u16(both >> 16)});
    }
    return result;
  }

  __device__ static constexpr bool are_whole() { return true; }

  template <bool>
  __device__ __forceinline__ void put(int row, const Result& result) const {
    HALF* at = (row % 2 ? odd : even) + row * kSlabK;  // rows eight apart are swizzled alike
#pragma unroll
    for (int term = 0; term < TERMS; ++term)
      *reinterpret_cast<u32*>(at + term * size_t(n) * extent) = result.of[term];
  }
};

template <class Stored>
struct LinearPair {
  static constexpr bool kIsGated = false;
  const float* bias_n;
  Stored* out_mn;
  int n;

  __device__ float bias(int column) const {
    return bias_n && column < n ? bias_n[column] : 0.0f;
  }

  __device__ __forceinline__ void operator()(int row, int column, float a, float b) const {
    const float sums[] = {a + bias(column), b + bias(column + 1)};
    store_neighbours(out_mn + size_t(row) * n + column, Neighbours<Stored, 2>(sums), n - column,
                     n % 2 == 0);
  }
};

struct GatedPair {
  static constexpr bool kIsGated = true;
  HALF* out;
  int n, extent;

  __device__ __forceinline__ void operator()(int row, int column, float gate, float up) const {
    if (column / 2 < n)
      out[in_slabs(row, column / 2, extent)] = HALF{u16(HALF::both(gated(gate, up), 0))};
  }
};
