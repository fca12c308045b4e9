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

// Between the last ordinary access to the sums and the first instruction that adds to them.
__device__ inline void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// After the last wait: keeps the compiler from reading the sums before it.
template <int kCount>
__device__ __forceinline__ void wgmma_end(float* d) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// d[64 x n] = (adds ? d : 0) + a[64 x 16] @ b[n x 16].T.  Thread t of a warp w holds, in
// d[4 i + 2 j + l], the sum of row 16 w + t / 4 + 8 j and column 8 i + t % 4 * 2 + l.
template <int n>
struct Wgmma;

#define SUMS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define NAMES_8 "%0, %1, %2, %3"
#define SUMS_8 SUMS_4(0)
#define NAMES_16 NAMES_8 ", %4, %5, %6, %7"
#define SUMS_16 SUMS_8, SUMS_4(4)
#define NAMES_24 NAMES_16 ", %8, %9, %10, %11"
#define SUMS_24 SUMS_16, SUMS_4(8)
#define NAMES_32 NAMES_24 ", %12, %13, %14, %15"
#define SUMS_32 SUMS_24, SUMS_4(12)
#define NAMES_40 NAMES_32 ", %16, %17, %18, %19"
#define SUMS_40 SUMS_32, SUMS_4(16)
#define NAMES_48 NAMES_40 ", %20, %21, %22, %23"
#define SUMS_48 SUMS_40, SUMS_4(20)
#define NAMES_56 NAMES_48 ", %24, %25, %26, %27"
#define SUMS_56 SUMS_48, SUMS_4(24)
#define NAMES_64 NAMES_56 ", %28, %29, %30, %31"
#define SUMS_64 SUMS_56, SUMS_4(28)
#define NAMES_72 NAMES_64 ", %32, %33, %34, %35"
#define SUMS_72 SUMS_64, SUMS_4(32)
#define NAMES_80 NAMES_72 ", %36, %37, %38, %39"
#define SUMS_80 SUMS_72, SUMS_4(36)
#define NAMES_88 NAMES_80 ", %40, %41, %42, %43"
#define SUMS_88 SUMS_80, SUMS_4(40)
#define NAMES_96 NAMES_88 ", %44, %45, %46, %47"
#define SUMS_96 SUMS_88, SUMS_4(44)
#define NAMES_104 NAMES_96 ", %48, %49, %50, %51"
#define SUMS_104 SUMS_96, SUMS_4(48)
#define NAMES_112 NAMES_104 ", %52, %53, %54, %55"
#define SUMS_112 SUMS_104, SUMS_4(52)
#define NAMES_120 NAMES_112 ", %56, %57, %58, %59"
#define SUMS_120 SUMS_112, SUMS_4(56)
#define NAMES_128 NAMES_120 ", %60, %61, %62, %63"
#define SUMS_128 SUMS_120, SUMS_4(60)
#define NAMES_136 NAMES_128 ", %64, %65, %66, %67"
#define SUMS_136 SUMS_128, SUMS_4(64)
#define NAMES_144 NAMES_136 ", %68, %69, %70, %71"
#define SUMS_144 SUMS_136, SUMS_4(68)
#define NAMES_152 NAMES_144 ", %72, %73, %74, %75"
#define SUMS_152 SUMS_144, SUMS_4(72)
#define NAMES_160 NAMES_152 ", %76, %77, %78, %79"
#define SUMS_160 SUMS_152, SUMS_4(76)
#define NAMES_168 NAMES_160 ", %80, %81, %82, %83"
#define SUMS_168 SUMS_160, SUMS_4(80)
#define NAMES_176 NAMES_168 ", %84, %85, %86, %87"
#define SUMS_176 SUMS_168, SUMS_4(84)
#define NAMES_184 NAMES_176 ", %88, %89, %90, %91"
#define SUMS_184 SUMS_176, SUMS_4(88)
#define NAMES_192 NAMES_184 ", %92, %93, %94, %95"
#define SUMS_192 SUMS_184, SUMS_4(92)

#define WGMMA(n, a_b, adds)                                                                      \
  template <>                                                                                    \
  struct Wgmma<n> {                                                                              \
    __device__ static __forceinline__ void multiply(float* d, u64 a, u64 b, bool is_adding) {    \
      asm volatile("{ .reg .pred adds;\n"                                                        \
                   "setp.ne.b32 adds, " adds ", 0;\n"                                            \
                   "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." MMA_TYPE "." MMA_TYPE " {"  \
                   NAMES_##n "}, " a_b ", adds, 1, 1, 0, 0; }"                                   \
                   : SUMS_##n                                                                    \
                   : "l"(a), "l"(b), "r"(int(is_adding)));                                       \
    }                                                                                            \
  };
WGMMA(8, "%4, %5", "%6")
WGMMA(16, "%8, %9", "%10")
WGMMA(24, "%12, %13", "%14")
WGMMA(32, "%16, %17", "%18")
WGMMA(40, "%20, %21", "%22")
WGMMA(48, "%24, %25", "%26")
WGMMA(56, "%28, %29", "%30")
WGMMA(64, "%32, %33", "%34")
WGMMA(72, "%36, %37", "%38")
WGMMA(80, "%40, %41", "%42")
WGMMA(88, "%44, %45", "%46")
WGMMA(96, "%48, %49", "%50")
WGMMA(104, "%52, %53", "%54")
WGMMA(112, "%56, %57", "%58")
WGMMA(120, "%60, %61", "%62")
WGMMA(128, "%64, %65", "%66")
WGMMA(136, "%68, %69", "%70")
WGMMA(144, "%72, %73", "%74")
WGMMA(152, "%76, %77", "%78")
WGMMA(160, "%80, %81", "%82")
WGMMA(168, "%84, %85", "%86")
WGMMA(176, "%88, %89", "%90")
WGMMA(184, "%92, %93", "%94")
WGMMA(192, "%96, %97", "%98")
#undef WGMMA
