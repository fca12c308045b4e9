// What kernels take from CUDA C++, on a host: a host thread per thread of a CTA.  CTAs run one
// after another, so the shared memory of a CTA is memory of the program.
#pragma once
#include <algorithm>
#include <atomic>
#include <barrier>
#include <bit>
#include <cmath>
#include <cstring>
#include <deque>
#include <thread>
#include <vector>

#include "types.cuh"

#define __CUDA_ARCH__ 750  // a chip without copies that run beside the arithmetic
#define __device__
#define __global__
#define __forceinline__ inline
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) uint4 {
  u32 x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct Index {
  u32 x, y, z;
};

inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline u32 __float_as_uint(float x) { return std::bit_cast<u32>(x); }
inline float __uint_as_float(u32 bits) { return std::bit_cast<float>(bits); }
inline float __int_as_float(u32 bits) { return std::bit_cast<float>(bits); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline int atomicAdd(int* at, int more) { return std::atomic_ref<int>(*at).fetch_add(more); }
using std::max;
using std::min;

inline thread_local Index threadIdx;
inline Index blockIdx, blockDim, gridDim;

// Addresses in shared memory count from the beginning of what a launch asks for.
extern __align__(128) float shared[];
inline size_t __cvta_generic_to_shared(const void* pointer) {
  return static_cast<const char*>(pointer) - reinterpret_cast<char*>(shared);
}
inline void* __cvta_shared_to_generic(size_t address) {
  return reinterpret_cast<char*>(shared) + address;
}

struct Barriers {
  std::barrier<> of_cta;
  std::deque<std::barrier<>> of_groups;

  Barriers(int threads, int groups) : of_cta(threads) {
    for (int i = 0; i < groups; ++i) of_groups.emplace_back(threads / groups);
  }
};
inline Barriers* barriers;  // of the launch

inline void __syncthreads() { barriers->of_cta.arrive_and_wait(); }

// Runs a kernel; `prepare` is called before each CTA.
template <class Prepare, class Kernel>
void launch(Index grid, int threads, int groups, Prepare prepare, Kernel kernel) {
  Barriers own(threads, groups);
  barriers = &own, gridDim = grid, blockDim = {u32(threads), 1, 1};
  auto run = [=](u32 thread) {
    threadIdx = {thread, 0, 0};
    for (u32 i = 0; i < grid.x * grid.y * grid.z; ++i) {
      __syncthreads();
      if (thread == 0)
        blockIdx = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y}, prepare();
      __syncthreads();
      kernel();
    }
  };
  std::vector<std::jthread> running;
  for (int i = 0; i < threads; ++i) running.emplace_back(run, i);
}
