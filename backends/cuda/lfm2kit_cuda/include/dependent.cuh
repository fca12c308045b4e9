// Programmatic dependent launch (from sm_90 on): a kernel's CTAs are placed while the kernel
// before it still runs, so that what comes before a CTA's first load takes no time of its own.
//
// A source that includes this header promises that every CTA of each of its kernels calls
// `wait_for_previous` before it writes, and before it reads what the kernel ahead may write.  Before the
// call it may read weights, and by `early` what was written before that kernel began.  All kernels
// call `wait_for_previous` before `let_next_start`, so what is older than the kernel ahead is complete.
// `kernels.py` launches such a source's kernels early.
#pragma once

__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Reads what is older than the kernel ahead, before the wait: not from the L1 cache, which may hold what
// lay there before.
template <class T>
__device__ __forceinline__ T early(const T* at) {
  if constexpr (sizeof(T) == sizeof(uint4)) {
    uint4 words = __ldcg(reinterpret_cast<const uint4*>(at));
    return reinterpret_cast<const T&>(words);
  } else {
    static_assert(sizeof(T) == sizeof(unsigned), "a word or four");
    unsigned word = __ldcg(reinterpret_cast<const unsigned*>(at));
    return reinterpret_cast<const T&>(word);
  }
}

// From here on the next kernel's CTAs may be placed, once every CTA has come here or ended.  A
// kernel that fills the device calls this late or never: placed early, they would crowd on the few SMs
// that it leaves free.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
