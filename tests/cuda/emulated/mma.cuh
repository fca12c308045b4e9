// As the header of this name in lfm2kit_cuda/include, on a host: products are added one after the other.
#pragma once
#include "warps.h"

struct Words {
  u32 of[6];
};
inline Words of_lanes[kMostWarps][32];  // what the lanes of a warp tell each other

// Returns what all lanes of this warp tell.  Nobody tells more before `__syncwarp`.
inline const Words* told_by_lanes(const Words& mine) {
  Words* words = of_lanes[threadIdx.x / 32];
  words[threadIdx.x % 32] = mine;
  __syncwarp();
  return words;
}

inline void read_matrices(u32 (&to)[4], u32 address) {
  int lane = threadIdx.x % 32;
  if (address + 16 > SHARED_BYTES) std::fputs("beyond shared memory\n", stderr), std::exit(1);
  const Words* words = told_by_lanes({{address}});
  for (int i = 0; i < 4; ++i)
    std::memcpy(to + i, __cvta_shared_to_generic(words[i * 8 + lane / 4].of[0] + lane % 4 * 4), 4);
  __syncwarp();
}

inline float half_of(u32 both, int i) { return HALF::to_float(HALF{u16(both >> 16 * i)}); }

inline void multiply(float* acc, const u32 (&a)[4], u32 b0, u32 b1) {
  int lane = threadIdx.x % 32;
  const Words* words = told_by_lanes({{a[0], a[1], a[2], a[3], b0, b1}});
  for (int at = 0; at < 4; ++at)
    for (int k = 0; k < 16; ++k) {
      const Words &row = words[lane / 4 * 4 + k % 8 / 2], &column = words[(lane % 4 * 2 + at % 2) * 4 + k % 8 / 2];
      acc[at] += half_of(row.of[k / 8 * 2 + at / 2], k % 2) * half_of(column.of[4 + k / 8], k % 2);
    }
  __syncwarp();
}
