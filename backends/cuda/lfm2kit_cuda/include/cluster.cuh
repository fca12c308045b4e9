// Thread block clusters: CTAs that run at the same time and write into each other's shared memory, from
// sm_90 on.  Where there are none, a cluster is one CTA.
//
// What is sent is counted by a barrier of the CTA that gets it, and each barrier serves once.  So a CTA may
// end as soon as it has waited for what is sent to it.  `synchronize_cluster` is for the beginning: later it
// would wait for stores to global memory, and empty the L1 cache.
#pragma once
#include "barrier.cuh"

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
  int number;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(number));
  return number;
#else
  return 0;
#endif
}

// The threads of a cluster wait for each other.  Nothing can be sent before.
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

// Says how many bytes all CTAs together will send to this barrier.
__device__ __forceinline__ void expect(u64* barrier, int bytes) {
#if __CUDA_ARCH__ >= 900
  barrier_init(barrier, 1);
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  barrier_promise(barrier, bytes);
  barrier_arrive(barrier);
#endif
}

// Writes a value into the shared memory of a CTA: to where this CTA has `to`.
__device__ __forceinline__ void send(int cta, u64* to, u64 value, u64* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{ .reg .u32 there, barrier;\n"
      "mapa.shared::cluster.u32 there, %0, %3;\n"
      "mapa.shared::cluster.u32 barrier, %2, %3;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.b64 [there], %1, [barrier]; }" ::"r"(
          shared_address(to)),
      "l"(value), "r"(shared_address(barrier)), "r"(cta)
      : "memory");
#else
  *to = value;
#endif
}

// Waits until all has arrived that is sent to this barrier.
__device__ __forceinline__ void wait_for_sent(u64* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{ .reg .pred done;\n"
      "again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n"
      "@!done bra again; }" ::"r"(shared_address(barrier))
      : "memory");
#else
  __syncthreads();
#endif
}
