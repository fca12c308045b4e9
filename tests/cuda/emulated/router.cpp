// Runs the kernel `choose` of router.cu on the host:
//
//     router TOKENS NORMALISE SCALING < SUMS AND BIAS > IDS AND WEIGHTS
//
// All are 4 bytes an element and as the kernel takes them.
#include "warps.h"

#include <cstdio>
#include <cstdlib>

#define __shared__ static
#include "blocks/router.cu"

int main(int, char** argv) {
  int tokens = std::atoi(argv[1]);
  std::vector<float> sums(size_t(kSplits) * tokens * EXPERTS), bias(EXPERTS);
  for (auto* array : {&sums, &bias})
    if (std::fread(array->data(), 4, array->size(), stdin) != array->size()) return 1;
  std::vector<int> ids(size_t(tokens) * TAKEN, -1);
  std::vector<float> weights(ids.size());
  Index grid{u32((tokens + kChoosingRows - 1) / kChoosingRows), 1, 1};
  launch(grid, kChoosingRows * kWarp, kChoosingRows, [] {}, [&] {
    choose(sums.data(), bias.data(), ids.data(), weights.data(), tokens, std::atoi(argv[2]),
           float(std::atof(argv[3])));
  });
  std::fwrite(ids.data(), 4, ids.size(), stdout);
  std::fwrite(weights.data(), 4, weights.size(), stdout);
}
