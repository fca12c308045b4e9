// Runs a kernel of few_rows90.cu on the host:
//
//     few_rows90 NAME GRID NUMBER... < ARRAYS > OUTPUT
//
// NUMBER... are the kernel's ints and ARRAYS its arrays, both in the order of its parameters
// (arrays.h).  OUTPUT is the array that it writes.
#include "arrays.h"
#include "f32.h"

#include "conversions.h"
#include "halves.h"

#include <limits>
#include <string>

inline float __fdividef(float x, float y) { return x / y; }

#define __shared__  // at namespace scope
#include "few_rows90.cu"

float shared[SHARED_BYTES / 4];

void poison() { std::fill(std::begin(shared), std::end(shared), NAN); }

int main(int argc, char** argv) {
  std::string name = argv[1];
  auto number = [=](int i) { return std::atoi(argv[3 + i]); };
  std::vector<Bytes> arrays = read_arrays();
  auto at = [&](int i) -> void* { return arrays[i].empty() ? nullptr : arrays[i].data(); };
  auto halves = [&](int i) { return static_cast<HALF*>(at(i)); };
  auto ints = [&](int i) { return static_cast<int*>(at(i)); };
  auto tiles = [&](int i) { return static_cast<int4*>(at(i)); };
  auto linear = [&](auto kernel, auto* out) {
    kernel(halves(0), ints(1), halves(2), static_cast<float*>(at(3)), out, tiles(5), ints(6),
           number(0), number(1), number(2), number(3), number(4), number(5), number(6), number(7),
           number(8), number(9), number(10));
  };
  int warps = kCopyingWarps + number(7);
  launch({u32(std::atoi(argv[2])), 1, 1}, warps * kWarp, warps, poison, [&] {
    if (name == "linear_few_mma") linear(linear_few_mma, static_cast<F32*>(at(4)));
    if (name == "linear_rounded_few_mma") linear(linear_rounded_few_mma, halves(4));
    if (name == "gated_few_mma")
      gated_few_mma(halves(0), ints(1), halves(2), halves(3), tiles(4), ints(5), number(0),
                    number(1), number(2), number(3), number(4), number(5), number(6), number(7),
                    number(8), number(9), number(10), number(11));
  });
  const Bytes& output = arrays[name == "gated_few_mma" ? 3 : 4];
  std::fwrite(output.data(), 1, output.size(), stdout);
}
