// Runs the kernels of router.cu that follow `logits` on the host:
//
//     router TOKENS NORMALISE SCALING < SUMS AND BIAS > IDS, WEIGHTS, SCORES, IDS, WEIGHTS
//
// All are 4 bytes an element and as the kernels take them.  The first ids and weights are those of
// `choose_by_sums`, the second ones those of `score` and then `choose`.
#include "warps.h"

#include <cstdio>
#include <cstdlib>
#include <limits>

#define __shared__ static
#include "blocks/router.cu"

struct Choice {
  std::vector<int> ids;
  std::vector<float> weights;

  explicit Choice(int tokens) : ids(size_t(tokens) * TAKEN, -1), weights(ids.size()) {}

  void write() const {
    std::fwrite(ids.data(), 4, ids.size(), stdout);
    std::fwrite(weights.data(), 4, weights.size(), stdout);
  }
};

int main(int, char** argv) {
  int tokens = std::atoi(argv[1]), normalise = std::atoi(argv[2]);
  float scaling = float(std::atof(argv[3]));
  std::vector<float> sums(size_t(kSplits) * tokens * EXPERTS), bias(EXPERTS);
  for (auto* array : {&sums, &bias})
    if (std::fread(array->data(), 4, array->size(), stdin) != array->size()) return 1;
  u32 rows = (tokens + kChoosingRows - 1) / kChoosingRows;
  auto run = [=](u32 panels, auto kernel) {
    launch({rows, panels, 1}, kChoosingRows * kWarp, kChoosingRows, [] {}, kernel);
  };
  Choice together(tokens), apart(tokens);
  std::vector<float> scores(size_t(tokens) * EXPERTS, std::numeric_limits<float>::infinity());
  run(1, [&] {
    choose_by_sums(sums.data(), bias.data(), together.ids.data(), together.weights.data(), tokens,
                   normalise, scaling);
  });
  run(kPanels, [&] { score(sums.data(), scores.data(), tokens); });
  run(1, [&] {
    choose(scores.data(), bias.data(), apart.ids.data(), apart.weights.data(), tokens, normalise,
           scaling);
  });
  together.write();
  std::fwrite(scores.data(), 4, scores.size(), stdout);
  apart.write();
}
