// As the header of this name in lfm2kit_cuda/include, on a host, where ranks are processes that share
// their mailboxes.  The host's processors make stores visible in their order; a GPU's do not, at
// another GPU.  So a store into a peer's memory waits here until a flag is raised after it, or until
// the kernel has ended, and then they come in any order.
#pragma once
#include "ordering.cuh"

struct Stored {
  char* at;
  std::vector<char> bytes;
};
inline std::vector<Stored> stored;  // and not visible yet

// Pauses in one of `times` calls, for up to `most` microseconds.
inline void pause_now_and_then(u32 times, u32 most = 400) {
  if (u32(std::rand()) % times == 0) usleep(u32(std::rand()) % most);
}

template <class T>
inline void store_to_peer(T* at, T value) {
  const char* from = reinterpret_cast<const char*>(&value);
  pause_now_and_then(500);
  let_another_go_on();
  stored.push_back({reinterpret_cast<char*>(at), {from, from + sizeof(T)}});
}

inline void make_visible() {
  for (size_t i = stored.size(); i > 1; --i) std::swap(stored[i - 1], stored[std::rand() % i]);
  for (const Stored& one : stored) std::memcpy(one.at, one.bytes.data(), one.bytes.size());
  stored.clear();
}

inline void raise_flag(u32* at, u32 value) {
  make_visible();
  store_release(at, value);
}
