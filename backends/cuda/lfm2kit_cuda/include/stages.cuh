// A ring of stages in shared memory, through which a group of warps streams two operands that lie
// in global memory as they are to lie in a stage.  From sm_90 on one thread starts bulk copies, and
// barriers in shared memory tell when a stage is full and when it is free; before, every thread of
// the group copies its part.  What a thread need not have at hand is kept in shared memory: the
// loops that use a ring have no registers to spare.
#pragma once
#include "async_copy.cuh"
#include "shared_memory.cuh"

// kStages stages for a group of kThreads threads: kFirst floats of one operand, kSecond of another.
template <int kStages, int kFirst, int kSecond, int kThreads>
class Stages {
 public:
  static constexpr int kFloats = kFirst + kSecond;

  // What is to be copied: `steps` stages.
  struct Source {
    const float *first, *second;
    int steps;
  };

  // What the groups share with their threads.
  struct Shared {
    u64 full[kStages], free[kStages];
    Source source;
  };

  // The barriers of all groups; called by all threads of a block, and followed by __syncthreads.
  __device__ static __forceinline__ void prepare(Shared* shared) {
#if __CUDA_ARCH__ >= 900
    int group = threadIdx.x / kThreads, i = threadIdx.x % kThreads;
    if (i < 2 * kStages)
      asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(shared[group].full + i)),
                   "r"(i < kStages ? 1 : kThreads / 32));
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
  }

  __device__ __forceinline__ Stages(float* stages, Shared* shared)
      : group(threadIdx.x / kThreads),
        shared(shared + group),
        begin(shared_address(stages) + group * kStages * kFloats * 4) {}

  // Starts the copies of the first stages; those of the source before may still be in use.
  __device__ __forceinline__ void start(const Source& source) {
#if __CUDA_ARCH__ >= 900
    if (!leads()) return;
    shared->source = source;
#else
    synchronize_group<kThreads>(group);
    if (threadIdx.x % kThreads == 0) shared->source = source;
    synchronize_group<kThreads>(group);
#endif
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) copy(i, used + i);
  }

  // Where `left` stages are yet to be read, starts the copy of the last of the next kStages.
  __device__ __forceinline__ void refill(int left) {
#if __CUDA_ARCH__ >= 900
    if (!leads()) return;
#endif
    copy(shared->source.steps - left + kStages - 1, used + kStages - 1);
  }

  // Waits until the next stage is full.
  __device__ __forceinline__ void wait() const {
#if __CUDA_ARCH__ >= 900
    wait_for(barrier(used % kStages), used / kStages % 2);
#else
    wait_copies<kStages - 2>();
    synchronize_group<kThreads>(group);
#endif
  }

  __device__ __forceinline__ u32 address() const { return address(used); }

  // Goes on to the next stage; returns what `release` is to be given for the one before.
  __device__ __forceinline__ u32 next() { return barrier(kStages + used++ % kStages); }

  // This warp has read a stage.
  __device__ __forceinline__ void release(u32 barrier) const {
#if __CUDA_ARCH__ >= 900
    __syncwarp();
    if (threadIdx.x % 32 == 0)
      asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
#endif
  }

 private:
  // Of the source's stages the one of number `step`, which is the ring's of number `turn`.
  __device__ __forceinline__ void copy(int step, u32 turn) {
    const Source& from = shared->source;
    bool is_there = step < from.steps;
    u32 to = address(turn);
#if __CUDA_ARCH__ >= 900
    if (!is_there) return;
    u32 full = barrier(turn % kStages);
    // A wait for the other parity passes at once: at first all stages are free.
    wait_for(full + 8 * kStages, turn / kStages % 2 ^ 1);
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(full),
                 "r"(4 * kFloats)
                 : "memory");
    copy_bulk(to, from.first + size_t(step) * kFirst, 4 * kFirst, full);
    copy_bulk(to + 4 * kFirst, from.second + size_t(step) * kSecond, 4 * kSecond, full);
#else
    if (is_there) {
      copy_share(to, from.first + size_t(step) * kFirst, kFirst);
      copy_share(to + 4 * kFirst, from.second + size_t(step) * kSecond, kSecond);
    }
    commit_copies();
#endif
  }

  // Groups' first and second warps in turns, so that all schedulers have their share of it.
  __device__ __forceinline__ bool leads() const {
    return threadIdx.x % kThreads == group / 2 * 32 % kThreads;
  }

  __device__ __forceinline__ u32 address(u32 turn) const {
    return begin + turn % kStages * kFloats * 4;
  }

  __device__ __forceinline__ u32 barrier(u32 i) const {  // full ones first, then free
    return shared_address(shared->full) + 8 * i;
  }

  __device__ static __forceinline__ void wait_for(u32 barrier, u32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred is_over;\n"
        "WAIT_%=:\n"
        "mbarrier.try_wait.parity.shared.b64 is_over, [%0], %1;\n"
        "@is_over bra DONE_%=;\n"
        "bra WAIT_%=;\n"
        "DONE_%=:\n"
        "}" ::"r"(barrier), "r"(parity)
        : "memory");
  }

  __device__ static __forceinline__ void copy_bulk(u32 to, const float* from, u32 bytes,
                                                   u32 full) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(to), "l"(from), "r"(bytes), "r"(full)
        : "memory");
  }

  __device__ static __forceinline__ void copy_share(u32 to, const float* from, int floats) {
    char* shared = static_cast<char*>(__cvta_shared_to_generic(to));
    for (int i = threadIdx.x % kThreads * 4; i < floats; i += kThreads * 4)
      copy_async<16>(shared + 4 * i, from + i, 16);
  }

  int group;
  Shared* shared;
  u32 begin;
  u32 used = 0;  // stages so far
};
