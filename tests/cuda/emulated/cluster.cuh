// As the header of this name in lfm2kit_cuda/include, on a host: a launch has all CTAs of a cluster.
#pragma once
#include "device.h"

constexpr int kMostCtas = 8;
#define CLUSTER_OF(ctas)

inline int cluster_index() { return blockIdx.x; }
inline void synchronize_cluster() { wait_at(barriers.of_cluster); }

template <class Memory>
Memory* memory_of_cta() {
  static Memory memories[kMostCtas];
  return memories + cta_of_cluster();
}

template <class Memory>
const Memory* memory_of(const Memory* here, int cta) {
  return here + cta - cta_of_cluster();
}
