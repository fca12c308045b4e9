// As the header of this name in lfm2kit_cuda/include, on a host: a launch has all CTAs of a cluster, and
// what is sent has arrived at once.
#pragma once
#include "barrier.cuh"
#include "device.h"

constexpr int kMostCtas = 8;
#define CLUSTER_OF(ctas)

inline int cluster_index() { return blockIdx.x; }
inline void synchronize_cluster() { wait_at(barriers.of_cluster); }

// The memories of the CTAs lie behind each other.
struct Memories {
  char *begin, *end;
};
inline std::vector<Memories> memories;

template <class Memory>
Memory* memory_of_cta() {
  static Memory of_ctas[kMostCtas];
  static bool is_known = false;
  if (!is_known) memories.push_back({(char*)of_ctas, (char*)(of_ctas + kMostCtas)});
  is_known = true;
  return of_ctas + cta_of_cluster();
}

inline u64* there(u64* here, int cta) {
  char* at = (char*)here;
  for (auto [begin, end] : memories)
    if (begin <= at && at < end) return (u64*)(at + (end - begin) / kMostCtas * (cta - cta_of_cluster()));
  std::fputs("it is not in shared memory\n", stderr), std::exit(1);
}

inline void expect(u64* barrier, int bytes) {
  barrier_init(barrier, 1), barrier_promise(barrier, bytes), barrier_arrive(barrier);
}

inline void send(int cta, u64* to, u64 value, u64* barrier) {
  *there(to, cta) = value;
  Counter& arriving = counter(there(barrier, cta));
  arriving.bytes -= sizeof value, arriving.look();
}

inline void wait_for_sent(u64* barrier) { barrier_wait(barrier, 0); }
