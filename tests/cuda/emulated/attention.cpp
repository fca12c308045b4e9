// Runs the kernel `attend` of attention.cu on the host, without a state:
//
//     attention TOKENS SEQUENCES MAX_SEQLEN SCALE < QKV, POSITIONS AND CU_SEQLENS > HEADS
//
// All are 4 bytes an element and as the kernel takes them.
#include "warps.h"

#include <cstdio>
#include <cstdlib>

struct F32 {
  float value;
  static float to_float(F32 x) { return x.value; }
  static F32 from_float(float x) { return F32{x}; }
};

inline void sincosf(float x, float* sin, float* cos) { *sin = std::sin(x), *cos = std::cos(x); }

#define __shared__ static
#include "blocks/attention.cu"

template <class T>
std::vector<T> read(size_t count) {
  std::vector<T> array(count);
  if (std::fread(array.data(), sizeof(T), count, stdin) != count) std::exit(1);
  return array;
}

int main(int, char** argv) {
  u32 tokens = std::atoi(argv[1]), sequences = std::atoi(argv[2]), longest = std::atoi(argv[3]);
  auto qkv = read<F32>(size_t(tokens) * kRow);
  auto positions = read<int>(tokens), ends = read<int>(sequences + 1);
  std::vector<F32> heads(size_t(tokens) * kQueries);
  Index grid{(longest + kRows - 1) / kRows, sequences, KV_HEADS};
  launch(grid, kThreads, kWarps, [] {}, [&] {
    attend(qkv.data(), nullptr, nullptr, positions.data(), ends.data(), nullptr, heads.data(),
           kQueries, 0, float(std::atof(argv[4])));
  });
  std::fwrite(heads.data(), sizeof(F32), heads.size(), stdout);
}
