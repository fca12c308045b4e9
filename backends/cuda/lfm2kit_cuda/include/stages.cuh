// Two stages in shared memory, through which a group of two warps streams two operands that lie
// in global memory as they are to lie in a stage.  From sm_90 on each warp fills a stage of its own,
// by bulk copies, and barriers in shared memory tell when a stage is full and when it is free;
// before, every thread of the group copies its part.
//
// Every instruction beside the multiplications takes a place of theirs.  Hence a group goes through
// its stages in rounds, and where a round is unrolled addresses are constants: all that has to be
// followed is the round's parity and where the copies have come to.  What a warp has in common is in
// its own registers (uniform.cuh).
#pragma once
#include "async_copy.cuh"
#include "shared_memory.cuh"
#include "uniform.cuh"

// For a group of kThreads threads: kFirst floats of one operand, up to kMostSecond of another.
template <int kFirst, int kMostSecond, int kThreads>
class Stages {
 public:
  static constexpr int kCount = STAGES, kFloats = kFirst + kMostSecond, kBytes = 4 * kFloats;
  static_assert(kThreads == 32 * kCount, "a warp fills a stage");

  // Where what is to be copied lies, one stage behind the other.
  struct Source {
    const float *first, *second;
  };

  // What the groups share with their threads.
  struct alignas(16) Shared {
    u64 full[kCount], free[kCount];
  };

  // Prepares the barriers of all groups; called by all threads of a CTA, before a __syncthreads.
  __device__ static __forceinline__ void prepare(Shared* shared) {
#if __CUDA_ARCH__ >= 900
    int group = threadIdx.x / kThreads, i = threadIdx.x % kThreads;
    if (i < 2 * kCount)
      asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(
                       shared_address(shared[group].full + i)),
                   "r"(i < kCount ? 1 : kThreads));
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
  }

  __device__ __forceinline__ Stages(float* stages, Shared* shared)
      : begin(uniform(shared_address(stages + threadIdx.x / kThreads * kCount * kFloats))),
        full(uniform(shared_address(shared[threadIdx.x / kThreads].full))),
        warp(uniform(threadIdx.x / 32 % kCount)) {}

  // Fills the first stage of a source; the last one of the source before may still be in use.
  __device__ __forceinline__ void start(const Source& source, int second) {
#if __CUDA_ARCH__ >= 900
    int before = warp - kCount;  // `refill` steps first, or addresses are moved to others for it
    from = {uniform(source.first) + before * kFirst, uniform(source.second) + before * second};
#else
    from = source;
#endif
    refill(0, second);
  }

  // Fills a stage with what comes next, as soon as the group has released it: `second` floats of the
  // second operand, the same number in all stages of a source.
  __device__ __forceinline__ void refill(int stage, int second) {
#if __CUDA_ARCH__ >= 900
    if (warp != stage) return;
    // A wait for the other parity passes at once: at first both stages are free.
    wait_for(full + 8 * (kCount + stage), parity ^ 1);
    from.first += kCount * kFirst, from.second += kCount * second;
    copy_bulk(begin + stage * kBytes, full + 8 * stage, 4 * second);
#else
    copy_share(begin + stage * kBytes, from.first, kFirst);
    copy_share(begin + stage * kBytes + 4 * kFirst, from.second, second);
    from.first += kFirst, from.second += second;
    commit_copies();
#endif
  }

  // Of the group's first stage.
  __device__ __forceinline__ u32 address() const { return begin; }

  // Waits until a stage is full.
  __device__ __forceinline__ void wait(int stage) const {
#if __CUDA_ARCH__ >= 900
    wait_for(full + 8 * stage, parity);
#else
    wait_copies<0>();
    synchronize_group<kThreads>(threadIdx.x / kThreads);
#endif
  }

  // From here on `refill` and `wait` are about the stages of the next round.
  __device__ __forceinline__ void go_round() { parity ^= 1; }

  // This thread has read a stage.  All arrive, not one for its warp: it is as fast, and racecheck
  // can follow it (__syncwarp before costs nothing where a warp has not diverged).
  __device__ __forceinline__ void release(int stage) const {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(full + 8 * (kCount + stage))
                 : "memory");
#endif
  }

 private:
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

  // Copies both operands, by one of a warp's threads.
  __device__ __forceinline__ void copy_bulk(u32 to, u32 its_full, u32 second_bytes) const {
    asm volatile(
        "{ .reg .pred is_elected;\n"
        "elect.sync _|is_elected, 0xffffffff;\n"
        "@is_elected mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;\n"
        "@is_elected cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%2], [%3], "
        "%4, [%0];\n"
        "@is_elected cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%5], [%6], "
        "%7, [%0]; }" ::"r"(its_full),
        "r"(4 * kFirst + second_bytes), "r"(to), "l"(from.first), "r"(4 * kFirst),
        "r"(to + 4 * kFirst), "l"(from.second), "r"(second_bytes)
        : "memory");
  }

  __device__ static __forceinline__ void copy_share(u32 to, const float* from, int floats) {
    char* shared = static_cast<char*>(__cvta_shared_to_generic(to));
    for (int i = threadIdx.x % kThreads * 4; i < floats; i += kThreads * 4)
      copy_async<16>(shared + 4 * i, from + i, 16);
  }

  u32 begin, full;  // the group's stages and barriers; the latter's second half says what is free
  int warp;         // of the group: the stage that it fills
  Source from;
  u32 parity = 0;  // of the round
};
