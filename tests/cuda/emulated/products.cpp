// Runs a kernel of gemm.cu or panels.cu on the host:
//
//     products NAME GRID_X GRID_Y GRID_Z NUMBER... < ARRAYS > OUTPUT
//
// NUMBER... are the kernel's ints and ARRAYS its arrays, both in the order of its parameters: the
// bytes that follow, in 8 bytes, then those; 0 for null.  OUTPUT is the array that it writes.
#include "arrays.h"
#include "device.h"

#include <cstdio>
#include <cstdlib>
#include <limits>
#include <string>

#define __shared__  // at namespace scope
#include "gemm.cu"
#undef __shared__

#define __shared__ static  // in a function
namespace panels {
#include "panels.cu"
}

float shared[kRings + kGroups * 4 * kPass * kPassRow];

// Fills a CTA's shared memory before it begins.
void poison() {
  std::fill(std::begin(shared), std::end(shared), std::numeric_limits<float>::quiet_NaN());
  std::memset(static_cast<void*>(&cta), 0xff, sizeof cta);
}

int main(int argc, char** argv) {
  std::string name = argv[1];
  auto number = [=](int i) { return std::atoi(argv[5 + i]); };
  Index grid{u32(std::atoi(argv[2])), u32(std::atoi(argv[3])), u32(std::atoi(argv[4]))};
  std::vector<Bytes> arrays = read_arrays();
  auto floats = [&](int i) { return reinterpret_cast<float*>(arrays[i].data()); };
  auto ints = [&](int i) { return reinterpret_cast<int*>(arrays[i].data()); };
  auto tiles = [&](int i) { return reinterpret_cast<int4*>(arrays[i].data()); };
  int output = name == "linear_simt" ? 3 : 2;

  if (name == "arrange")
    launch(grid, panels::kThreads, 1, [] {}, [&] {
      panels::arrange(floats(0), ints(1), floats(2), tiles(3), ints(4), number(0), number(1),
                      number(2), number(3));
    });
  if (name == "linear_simt")
    launch(grid, kThreads, kGroups, poison, [&] {
      linear_simt(floats(0), floats(1), floats(2), floats(3), tiles(4), ints(5), number(0),
                  number(1), number(2), number(3), number(4));
    });
  if (name == "gated_simt")
    launch(grid, kThreads, kGroups, poison, [&] {
      gated_simt(floats(0), floats(1), floats(2), tiles(3), ints(4), number(0), number(1),
                 number(2), number(3), number(4));
    });
  std::fwrite(arrays[output].data(), 1, arrays[output].size(), stdout);
}
