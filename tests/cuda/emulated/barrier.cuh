// As the header of this name in lfm2kit_cuda/include, on a host: copies are complete at once, and who
// waits lets others go on.
#pragma once
#include "async_copy.cuh"

struct Counter {
  u8 expected, arrived;
  u16 completed;  // phases
  int bytes;      // promised and not there yet

  void look() {
    if (arrived == expected && bytes == 0) arrived = 0, ++completed;
  }
};
static_assert(sizeof(Counter) == sizeof(u64));

inline Counter& counter(u64* barrier) { return *reinterpret_cast<Counter*>(barrier); }

inline void barrier_init(u64* barrier, int arrivals) { counter(barrier) = {u8(arrivals), 0, 0, 0}; }

inline void fence_stores() {}

inline void barrier_arrive(u64* barrier) { ++counter(barrier).arrived, counter(barrier).look(); }

inline void barrier_promise(u64* barrier, int bytes) { counter(barrier).bytes += bytes; }

inline void barrier_arrive_promising(u64* barrier, int bytes) {
  barrier_promise(barrier, bytes), barrier_arrive(barrier);
}

inline void barrier_wait(u64* barrier, u32 parity) {
  for (int turns = 0; counter(barrier).completed % 2 == parity; let_another_go_on())
    if (++turns == 100000) std::fputs("a thread waits for ever\n", stderr), std::exit(1);
}

inline void copy_bulk(void* to, const void* from, int bytes, u64* barrier) {
  std::memcpy(to, from, bytes);
  counter(barrier).bytes -= bytes, counter(barrier).look();
}
