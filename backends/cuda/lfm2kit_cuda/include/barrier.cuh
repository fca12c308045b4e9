// Barriers in shared memory, which count arrivals of threads and bytes of copies, and the copies
// of consecutive bytes that complete on them (from sm_90 on).
#pragma once
#include "async_copy.cuh"

__device__ inline void barrier_init(u64* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}

__device__ inline void barrier_arrive(u64* barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// What ordinary stores wrote to shared memory is seen by copies and matrix instructions after this.
__device__ inline void fence_stores() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Announces bytes to come to the phase that is under way.
__device__ inline void barrier_promise(u64* barrier, int bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

// Arrives, and announces bytes to come to the same phase.
__device__ inline void barrier_arrive_promising(u64* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

// Waits until the barrier's phase of this parity is complete.
__device__ inline void barrier_wait(u64* barrier, u32 parity) {
  asm volatile(
      "{ .reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
      "@!done bra again; }" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Starts the copy of consecutive bytes, a multiple of 16, to shared memory; it completes on `barrier`,
// which expects it.
__device__ inline void copy_bulk(void* to, const void* from, int bytes, u64* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}
