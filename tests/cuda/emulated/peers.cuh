// As the header of this name in lfm2kit_cuda/include, on a host, where ranks are processes that share
// their mailboxes.  The host's processors make stores visible in their order; a GPU's do not, at
// another GPU.  So a store into a peer's memory waits here until a flag is raised after it, or until
// the kernel has ended, and then they come in any order.
#pragma once
#include <unistd.h>

#include <mutex>
#include <random>

#include "ordering.cuh"

inline std::mt19937 chance;  // a rank's
inline std::mutex guard;     // of the two above and below

struct Stored {
  char* at;
  std::vector<char> bytes;
};
inline std::vector<Stored> stored;  // and not visible yet

// Pauses in one of `times` calls, for up to `most` microseconds.
inline void pause_now_and_then(u32 times, u32 most = 400) {
  u32 pause = 0;
  {
    std::lock_guard lock(guard);
    if (chance() % times == 0) pause = u32(chance() % most);
  }
  if (pause) usleep(pause);
}

template <class T>
inline void store_to_peer(T* at, T value) {
  const char* from = reinterpret_cast<const char*>(&value);
  pause_now_and_then(500);
  std::lock_guard lock(guard);
  stored.push_back({reinterpret_cast<char*>(at), {from, from + sizeof(T)}});
}

inline void make_visible() {
  std::lock_guard lock(guard);
  std::shuffle(stored.begin(), stored.end(), chance);
  for (const Stored& one : stored) std::memcpy(one.at, one.bytes.data(), one.bytes.size());
  stored.clear();
}

inline void raise_flag(u32* at, u32 value) {
  make_visible();
  store_release(at, value);
}
