// Thread block clusters: CTAs that run at the same time and read each other's shared memory, from sm_90
// on.  Where there are none, a cluster is one CTA.
//
// A CTA may read another one's memory between two calls of `synchronize_cluster`: before the first one
// the other CTA may not have begun, after the second one it may have ended.
#pragma once
#include "types.cuh"

#if __CUDA_ARCH__ >= 900
#define CLUSTER_OF(ctas) __cluster_dims__(ctas, 1, 1)
#else
#define CLUSTER_OF(ctas)
#endif

// Returns the number of a cluster in a grid that has them in x alone.
__device__ __forceinline__ int cluster_index() {
#if __CUDA_ARCH__ >= 900
  int index;
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(index));
  return index;
#else
  return blockIdx.x;
#endif
}

// Returns the number of this CTA in its cluster.
__device__ __forceinline__ int cta_of_cluster() {
#if __CUDA_ARCH__ >= 900
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}

// The threads of a cluster wait for each other; what they wrote before, all of them see then.
__device__ __forceinline__ void synchronize_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
#else
  __syncthreads();
#endif
}

// Returns the shared memory of this CTA, which is the same in all functions that ask for this type.
template <class Memory>
__device__ __forceinline__ Memory* memory_of_cta() {
  __shared__ Memory memory;
  return &memory;
}

// Returns where a CTA of the cluster has what this CTA has in its shared memory.
template <class Memory>
__device__ __forceinline__ const Memory* memory_of(const Memory* here, int cta) {
#if __CUDA_ARCH__ >= 900
  const Memory* there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(here), "r"(cta));
  return there;
#else
  return here;
#endif
}
