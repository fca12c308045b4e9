// The tensor cores' instruction for a warp (mma.sync), and how its operands come from shared memory.
// MMA_TYPE is "bf16" or "f16".
#pragma once
#include "types.cuh"

// Reads four matrices of 8 rows of 16 bytes; lane l has the address of row l % 8 of matrix l / 8, and
// gets elements l % 4 * 2 and the next of row l / 4 of each.
__device__ __forceinline__ void read_matrices(u32 (&to)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

// acc[16 x 8] += a[16 x 16] @ b[8 x 16].T.  Lane l holds in acc[2 j + i] the sum of row l / 4 + 8 j and
// column l % 4 * 2 + i; a has the matrices of rows 0 and 8, first of k 0 and then of k 8.
__device__ __forceinline__ void multiply(float* acc, const u32 (&a)[4], u32 b0, u32 b1) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." MMA_TYPE "." MMA_TYPE
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  for (int half = 0; half < 2; ++half)
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32." MMA_TYPE "." MMA_TYPE
                 ".f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
                 : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(half ? b1 : b0));
#endif
}
