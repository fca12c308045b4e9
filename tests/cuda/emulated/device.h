// What kernels take from CUDA C++, on a host: the threads of a CTA take turns.  CTAs run one
// after another, so the shared memory of a CTA is memory of the program.  The threads of a cluster
// (cluster.cuh) take turns together.
#pragma once
#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <vector>

#include "turns.h"
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
template <class T>
inline T __ldcg(const T* at) {
  return *at;
}
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline int atomicAdd(int* at, int more) { return std::atomic_ref<int>(*at).fetch_add(more); }
inline u32 atomicOr(u32* at, u32 bits) { return std::atomic_ref<u32>(*at).fetch_or(bits); }
using std::max;
using std::min;

inline Index blockIdx, blockDim, gridDim;
inline int cta_of_cluster() { return running() / int(blockDim.x); }
#define threadIdx (Index{u32(running()) % blockDim.x, 0, 0})

// Addresses in shared memory count from the beginning of what a launch asks for.
extern __align__(128) float shared[];
inline size_t __cvta_generic_to_shared(const void* pointer) {
  return static_cast<const char*>(pointer) - reinterpret_cast<char*>(shared);
}
inline void* __cvta_shared_to_generic(size_t address) {
  return reinterpret_cast<char*>(shared) + address;
}

struct Barriers {
  Barrier of_cluster;
  std::vector<Barrier> of_ctas, of_groups;
};
inline Barriers barriers;  // of the launch

inline void __syncthreads() { wait_at(barriers.of_ctas[cta_of_cluster()]); }

// Runs a kernel in a grid of clusters; `prepare` is called before each cluster.
template <class Prepare, class Kernel>
void launch(Index grid, int threads, int groups, Prepare prepare, Kernel kernel, int ctas = 1) {
  barriers = {{threads * ctas},
              std::vector<Barrier>(ctas, {threads}),
              std::vector<Barrier>(groups * ctas, {threads / groups})};
  gridDim = grid, blockDim = {u32(threads), 1, 1};
  take_turns(threads * ctas, [&](int thread) {
    for (u32 i = 0; i < grid.x * grid.y * grid.z; ++i) {
      wait_at(barriers.of_cluster);
      if (thread == 0)
        blockIdx = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y}, shuffle_turns(), prepare();
      wait_at(barriers.of_cluster);
      kernel();
    }
  });
}
