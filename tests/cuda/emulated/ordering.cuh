// As the header of this name in lfm2kit_cuda/include, on a host.
#pragma once
#include <time.h>
#include <unistd.h>

#include <atomic>

#include "device.h"

inline u32 load_acquire(const u32* at) {
  return std::atomic_ref<u32>(*const_cast<u32*>(at)).load(std::memory_order_acquire);
}

inline u32 load_relaxed(const u32* at) {
  return std::atomic_ref<u32>(*const_cast<u32*>(at)).load(std::memory_order_relaxed);
}

inline u64 load_two_relaxed(const u32* at) { return u64(load_relaxed(at + 1)) << 32 | load_relaxed(at); }

inline uint4 load_four_relaxed(const u32* at) {
  return uint4{load_relaxed(at), load_relaxed(at + 1), load_relaxed(at + 2), load_relaxed(at + 3)};
}

inline void store_relaxed(u32* at, u32 value) {
  std::atomic_ref<u32>(*at).store(value, std::memory_order_relaxed);
}

inline void store_release(u32* at, u32 value) {
  std::atomic_ref<u32>(*at).store(value, std::memory_order_release);
}

inline u32 arrive(u32* count) { return std::atomic_ref<u32>(*count).fetch_add(1); }

inline u64 nanoseconds() {
  // Who looks at the clock waits, and others need the core.
  usleep(20);
  let_another_go_on();
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return u64(now.tv_sec) * 1000000000 + u64(now.tv_nsec);
}
