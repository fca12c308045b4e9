// Runs `choose_by_sums` of router.cu, and then `choose_and_group` of grouping.cu, on the host:
//
//     grouping TOKENS LOCAL SLOTS MOST TILE_ROWS STEP BY_HEIGHT NORMALISE SCALING < X, SUMS, BIAS AND LOCAL IDS
//
// All are 4 bytes an element and as the kernels take them.  What comes out is what the first one writes and
// then what the second one does, each array with some elements behind it that are to stay as they are.
#include "f32.h"
#include "poison.h"

#define __shared__ static
#include "blocks/router.cu"
#include "blocks/grouping.cu"

float* floats(std::vector<int>& array) { return reinterpret_cast<float*>(array.data()); }

int main(int, char** argv) {
  auto number = [=](int i) { return std::atoi(argv[1 + i]); };
  int tokens = number(0), local = number(1), slots = number(2), normalise = number(7);
  float scaling = float(std::atof(argv[9]));
  auto x = read<float>(size_t(tokens) * HIDDEN);
  auto sums = read<float>(size_t(kSplits) * tokens * EXPERTS), bias = read<float>(EXPERTS);
  auto local_ids = read<int>(local);
  auto ids = poisoned(size_t(tokens) * TAKEN), weights = ids, its_ids = ids, its_weights = ids;
  auto source = poisoned(slots), place = ids, tiles = poisoned(4 * size_t(number(3)));
  auto count = poisoned(1);
  u32 rows = (tokens + kChoosingRows - 1) / kChoosingRows;
  launch({rows, 1, 1}, kChoosingRows * kWarp, kChoosingRows, [] {}, [&] {
    choose_by_sums(sums.data(), bias.data(), ids.data(), floats(weights), tokens, normalise, scaling);
  });
  auto prepare = [] { std::memset(static_cast<void*>(&grouping), 0x55, sizeof grouping); };
  launch({1, 1, 1}, MOST_TOKENS * kWarp, MOST_TOKENS, prepare, [&] {
    choose_and_group(x.data(), HIDDEN, sums.data(), bias.data(), its_ids.data(), floats(its_weights), tokens,
                     normalise, scaling, local_ids.data(), local, source.data(), slots,
                     place.data(), reinterpret_cast<int4*>(tiles.data()), count.data(), number(4),
                     number(5), number(6));
  });
  for (auto* array : {&ids, &weights, &its_ids, &its_weights, &source, &place, &tiles, &count})
    write(*array);
}
