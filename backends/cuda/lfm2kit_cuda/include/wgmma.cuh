// Hopper's asynchronous matrix instruction: a warpgroup (128 threads) multiplies 64 rows of A by
// n rows of B, both in shared memory with k inside, 64 elements in a row of 128 bytes, swizzled.
// MMA_TYPE is "bf16" or "f16".
#pragma once
#include "types.cuh"

// What the instruction is told of a matrix that begins at a shared address: rows of 128 bytes in
// groups of eight, 1024 bytes apart, swizzled over 128 bytes.
__device__ inline u64 matrix_descriptor(u32 address) {
  return u64(address >> 4 & 0x3fff) | u64(1) << 16 | u64(1024 >> 4) << 32 | u64(1) << 62;
}

// What ordinary copies wrote to shared memory is seen by the matrix instructions after this.
__device__ inline void fence_copies() { asm volatile("fence.proxy.async.shared::cta;"); }

// Between the last ordinary access to the sums and the first instruction that adds to them.
__device__ inline void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// d[64 x n] += a[64 x 16] @ b[n x 16].T.  Thread t of a warp w holds, in d[4 i + 2 j + l], the sum
// of row 16 w + t / 4 + 8 j and column 8 i + t % 4 * 2 + l.
template <int n>
struct Wgmma;

#define WGMMA_8(i)                                                                              \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])

template <>
struct Wgmma<32> {
  __device__ static __forceinline__ void multiply(float (&d)[16], u64 a, u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32." MMA_TYPE "." MMA_TYPE " "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
                 "%16, %17, 1, 1, 1, 0, 0;"
                 : WGMMA_8(0), WGMMA_8(8)
                 : "l"(a), "l"(b));
  }
};

template <>
struct Wgmma<64> {
  __device__ static __forceinline__ void multiply(float (&d)[32], u64 a, u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." MMA_TYPE "." MMA_TYPE " "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
                 "%32, %33, 1, 1, 1, 0, 0;"
                 : WGMMA_8(0), WGMMA_8(8), WGMMA_8(16), WGMMA_8(24)
                 : "l"(a), "l"(b));
  }
};

template <>
struct Wgmma<128> {
  __device__ static __forceinline__ void multiply(float (&d)[64], u64 a, u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." MMA_TYPE "." MMA_TYPE " "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
                 "%64, %65, 1, 1, 1, 0, 0;"
                 : WGMMA_8(0), WGMMA_8(8), WGMMA_8(16), WGMMA_8(24), WGMMA_8(32), WGMMA_8(40),
                   WGMMA_8(48), WGMMA_8(56)
                 : "l"(a), "l"(b));
  }
};

template <>
struct Wgmma<256> {
  __device__ static __forceinline__ void multiply(float (&d)[128], u64 a, u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32." MMA_TYPE "." MMA_TYPE " "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
                 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
                 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
                 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
                 "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
                 "%128, %129, 1, 1, 1, 0, 0;"
                 : WGMMA_8(0), WGMMA_8(8), WGMMA_8(16), WGMMA_8(24), WGMMA_8(32), WGMMA_8(40),
                   WGMMA_8(48), WGMMA_8(56), WGMMA_8(64), WGMMA_8(72), WGMMA_8(80), WGMMA_8(88),
                   WGMMA_8(96), WGMMA_8(104), WGMMA_8(112), WGMMA_8(120)
                 : "l"(a), "l"(b));
  }
};

#undef WGMMA_8
