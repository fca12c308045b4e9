// Reductions over a warp or a CTA, always in the same order: equal inputs give equal bits.
#pragma once

constexpr int kWarp = 32;

__device__ inline float infinity() { return __int_as_float(0x7f800000); }

// 1 / sqrt(the mean of `size` squares + eps); NaN where their sum is not finite: 1 / inf would hide it.
__device__ inline float inverse_rms(float squares, int size, float eps) {
  return squares < infinity() ? 1 / sqrtf(squares / size + eps) : __int_as_float(0x7fc00000);
}

__device__ inline float warp_sum(float x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

// Sums and maxima of several values, which do not wait for each other.
template <int kValues>
__device__ inline void warp_sums(float (&x)[kValues]) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
#pragma unroll
    for (int i = 0; i < kValues; ++i) x[i] += __shfl_xor_sync(~0u, x[i], offset);
}

template <int kValues>
__device__ inline void warp_maxima(float (&x)[kValues]) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
#pragma unroll
    for (int i = 0; i < kValues; ++i) x[i] = fmaxf(x[i], __shfl_xor_sync(~0u, x[i], offset));
}

__device__ inline int warp_sum(int x) {
#if __CUDA_ARCH__ >= 800
  return __reduce_add_sync(~0u, x);
#else
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
#endif
}

__device__ inline unsigned warp_max(unsigned x) {
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(~0u, x);
#else
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x = max(x, __shfl_xor_sync(~0u, x, offset));
  return x;
#endif
}

// The sum over a CTA of kThreads, in every thread.  `shared` holds a float per warp.
template <int kThreads>
__device__ float cta_sum(float x, float* shared) {
  x = warp_sum(x);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
  __syncthreads();
  float total = 0;
  for (int warp = 0; warp < kThreads / kWarp; ++warp) total += shared[warp];
  return total;
}
