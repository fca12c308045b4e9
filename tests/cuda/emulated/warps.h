// What the lanes of a warp tell each other, on a host: a launch has a group for each warp.
#pragma once
#include <bit>

#include "device.h"

constexpr int kMostWarps = 128;  // of a cluster
inline u64 told[kMostWarps][32];

inline int warp_of_cluster() { return running() / 32; }
inline void __syncwarp() { wait_at(barriers.of_groups[warp_of_cluster()]); }

// What `read` makes of what all lanes have told, of 4 or 8 bytes.
template <class T, class Read>
inline auto exchanged(T mine, Read read) {
  static_assert(sizeof(T) <= sizeof(u64));
  T* values = reinterpret_cast<T*>(told[warp_of_cluster()]);
  values[threadIdx.x % 32] = mine;
  __syncwarp();
  auto result = read(values);
  __syncwarp();
  return result;
}

inline u32 __ballot_sync(u32, bool mine) {
  return exchanged(u32(mine), [](const u32* words) {
    u32 bits = 0;
    for (int lane = 0; lane < 32; ++lane) bits |= words[lane] << lane;
    return bits;
  });
}

inline bool __any_sync(u32 lanes, bool mine) { return __ballot_sync(lanes, mine) != 0; }

template <class T>
inline T __shfl_sync(u32, T mine, int lane) {
  return exchanged(mine, [=](const T* values) { return values[lane]; });
}

template <class T>
inline T __shfl_up_sync(u32 lanes, T mine, int offset) {
  return __shfl_sync(lanes, mine, max(int(threadIdx.x % 32) - offset, 0));
}

template <class T>
inline T __shfl_xor_sync(u32 lanes, T mine, int offset) {
  return __shfl_sync(lanes, mine, int(threadIdx.x % 32) ^ offset);
}

inline int __popc(u32 bits) { return std::popcount(bits); }
inline int __ffs(u32 bits) { return bits ? std::countr_zero(bits) + 1 : 0; }
