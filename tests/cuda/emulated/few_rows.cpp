// Runs a kernel of few_rows.cu on the host: as products.cpp.
#include "arrays.h"
#include "warps.h"

#include <cstdio>
#include <cstdlib>
#include <limits>
#include <string>

#define __shared__  // at namespace scope
#include "few_rows.cu"

float shared[2 * kRanges * (kStages * kStage + kRows * kColumns)];

void poison() {
  std::fill(std::begin(shared), std::end(shared), std::numeric_limits<float>::quiet_NaN());
}

int main(int argc, char** argv) {
  std::string name = argv[1];
  auto number = [=](int i) { return std::atoi(argv[4 + i]); };
  Index grid{u32(std::atoi(argv[2])), u32(std::atoi(argv[3])), 1};
  std::vector<Bytes> arrays = read_arrays();
  auto floats = [&](int i) {
    return arrays[i].empty() ? nullptr : reinterpret_cast<float*>(arrays[i].data());
  };
  auto ints = [&](int i) {
    return arrays[i].empty() ? nullptr : reinterpret_cast<int*>(arrays[i].data());
  };
  auto tiles = [&](int i) {
    return arrays[i].empty() ? nullptr : reinterpret_cast<int4*>(arrays[i].data());
  };
  bool is_gated = name == "gated_few";
  int teams = (is_gated ? 2 : 1) * kRanges;
  launch(grid, 32 * kTeam * teams, teams, poison, [&] {
    if (is_gated)
      gated_few(floats(0), ints(1), floats(2), floats(3), tiles(4), ints(5), number(0), number(1),
                number(2), number(3), number(4), number(5));
    else
      linear_few(floats(0), ints(1), floats(2), floats(3), floats(4), tiles(5), ints(6), number(0),
                 number(1), number(2), number(3), number(4), number(5));
  });
  std::vector<char>& output = arrays[is_gated ? 3 : 4];
  std::fwrite(output.data(), 1, output.size(), stdout);
}
