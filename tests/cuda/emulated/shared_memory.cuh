// As the header of this name in lfm2kit_cuda/include, on a host.
#pragma once
#include "device.h"

inline void read_four(float* to, u32 address) {
  std::memcpy(to, __cvta_shared_to_generic(address), 4 * sizeof(float));
}

inline void read_two(float* to, u32 address) {
  std::memcpy(to, __cvta_shared_to_generic(address), 2 * sizeof(float));
}

template <int kThreads>
inline void synchronize_group(int group) {
  wait_at(barriers.of_groups[group]);
}
