// A ring of stages in shared memory, through which a group of warps streams two operands that lie
// in global memory as they are to lie in a stage.  From sm_90 on one warp starts bulk copies, and
// barriers in shared memory tell when a stage is full and when it is free; before, every thread of
// the group copies its part.  Every instruction beside the multiplications takes a place of theirs:
// hence what a warp has in common is in its own registers (uniform.cuh), and steps from stage to
// stage instead of being computed anew.
#pragma once
#include "async_copy.cuh"
#include "shared_memory.cuh"
#include "uniform.cuh"

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
  struct alignas(16) Shared {
    u64 full[kStages], free[kStages];
  };

  // The barriers of all groups; called by all threads of a block, and followed by __syncthreads.
  __device__ static __forceinline__ void prepare(Shared* shared) {
#if __CUDA_ARCH__ >= 900
    int group = threadIdx.x / kThreads, i = threadIdx.x % kThreads;
    if (i < 2 * kStages)
      asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(shared[group].full + i)),
                   "r"(i < kStages ? 1 : kThreads));
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
  }

  __device__ __forceinline__ Stages(float* stages, Shared* shared)
      : group(uniform(threadIdx.x / kThreads)),
        begin(uniform(shared_address(stages + group * kStages * kFloats))),
        full(uniform(shared_address(shared[group].full))) {}

  // Starts the copies of the first stages; those of the source before may still be in use.
  __device__ __forceinline__ void start(const Source& source) {
#if __CUDA_ARCH__ >= 900
    from = {uniform(source.first), uniform(source.second), leads() ? uniform(source.steps) : 0};
#else
    from = source;
    synchronize_group<kThreads>(group);
#endif
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) refill(i);
  }

  // Starts the copy of what is next, if anything is, to the stage after the next `ahead`.
  __device__ __forceinline__ void refill(int ahead = kStages - 1) {
    bool wraps = stage + ahead >= kStages;
    u32 to = wraps ? stage + ahead - kStages : stage + ahead;
    if (from.steps > 0) copy(to, parity ^ u32(wraps));
#if __CUDA_ARCH__ < 900
    commit_copies();
#endif
  }

  // Waits until the next stage is full.
  __device__ __forceinline__ void wait() const {
#if __CUDA_ARCH__ >= 900
    wait_for(full + 8 * stage, parity);
#else
    wait_copies<kStages - 2>();
    synchronize_group<kThreads>(group);
#endif
  }

  __device__ __forceinline__ u32 address() const { return begin + stage * kFloats * 4; }

  // Goes on to the next stage; returns what `release` is to be given for the one before.
  __device__ __forceinline__ u32 next() {
    u32 free = full + 8 * (kStages + stage);
    if (++stage == kStages) stage = 0, parity ^= 1;
    return free;
  }

  // This thread has read a stage.  All arrive, not one for its warp: it is as fast, and racecheck can
  // follow it (__syncwarp before is no instruction where a warp has not parted).
  __device__ __forceinline__ void release(u32 free) const {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(free) : "memory");
#endif
  }

 private:
  __device__ __forceinline__ void copy(u32 to_stage, u32 its_parity) {
    u32 to = begin + to_stage * kFloats * 4;
#if __CUDA_ARCH__ >= 900
    u32 its_full = full + 8 * to_stage;
    // A wait for the other parity passes at once: at first all stages are free.
    wait_for(its_full + 8 * kStages, its_parity ^ 1);
    copy_bulk(to, its_full);
#else
    copy_share(to, from.first, kFirst);
    copy_share(to + 4 * kFirst, from.second, kSecond);
#endif
    from.first += kFirst, from.second += kSecond, --from.steps;
  }

  // Groups' first and second warps in turns, so that all schedulers have their share of it.
  __device__ __forceinline__ bool leads() const {
    constexpr int kWarps = kThreads / 32;
    return uniform(threadIdx.x / 32) % kWarps == group / 2 % kWarps;
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

  // Both operands, by one of a warp's threads.
  __device__ __forceinline__ void copy_bulk(u32 to, u32 its_full) const {
    asm volatile(
        "{ .reg .pred is_elected;\n"
        "elect.sync _|is_elected, 0xffffffff;\n"
        "@is_elected mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;\n"
        "@is_elected cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%2], [%3], "
        "%4, [%0];\n"
        "@is_elected cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%5], [%6], "
        "%7, [%0]; }" ::"r"(its_full),
        "r"(4 * kFloats), "r"(to), "l"(from.first), "r"(4 * kFirst), "r"(to + 4 * kFirst),
        "l"(from.second), "r"(4 * kSecond)
        : "memory");
  }

  __device__ static __forceinline__ void copy_share(u32 to, const float* from, int floats) {
    char* shared = static_cast<char*>(__cvta_shared_to_generic(to));
    for (int i = threadIdx.x % kThreads * 4; i < floats; i += kThreads * 4)
      copy_async<16>(shared + 4 * i, from + i, 16);
  }

  int group;
  u32 begin, full;  // the group's stages and barriers; the latter's second half says what is free
  Source from;      // what is left of it, with no steps for threads that copy nothing
  u32 stage = 0, parity = 0;  // the next, and how often the ring has gone round
};
