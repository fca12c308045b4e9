// As the header of this name in lfm2kit_cuda/include, on a host: an instruction is complete at once, and
// adds its products one after the other.
#pragma once
#include "warps.h"

inline u64 matrix_descriptor(u32 address) { return address / 16; }

inline void fence_stores() {}
inline void wgmma_begin() {}
inline void wgmma_commit() {}
template <int kPending>
inline void wgmma_wait() {
  __syncwarp();  // what is read may be written from here on
}
template <int kCount>
inline void wgmma_end(float*) {}

// Element k of a row of a matrix in shared memory, which is as large as a launch says.
inline float element(u64 matrix, int row, int k) {
  u32 address = u32(matrix) * 16 + row * 128 + k * 2;
  address ^= address / 128 % 8 * 16;
  if (address >= SHARED_BYTES) std::fputs("beyond shared memory\n", stderr), std::exit(1);
  return HALF::to_float(*static_cast<HALF*>(__cvta_shared_to_generic(address)));
}

template <int n>
struct Wgmma {
  static void multiply(float* d, u64 a, u64 b, bool is_adding) {
    int lane = threadIdx.x % 32;
    for (int i = 0; i < n / 2; ++i) {
      int row = threadIdx.x / 32 * 16 + lane / 4 + i / 2 % 2 * 8;
      int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      if (!is_adding) d[i] = 0;
      for (int k = 0; k < 16; ++k) d[i] += element(a, row, k) * element(b, column, k);
    }
  }
};
