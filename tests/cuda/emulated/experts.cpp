// Runs a kernel of experts.cu on the host:
//
//     experts group PAIRS LOCAL EXPERTS SLOTS MOST TILE_ROWS STEP BY_HEIGHT < IDS AND LOCAL IDS
//     experts combine TOKENS COLUMNS SLOTS < OUTPUTS, PLACES AND WEIGHTS
//
// All are 4 bytes an element and as the kernels take them.  What comes out is what they write, each
// array with some elements behind it that are to stay as they are.
#include "f32.h"
#include "poison.h"

using BF16 = F32;

#define __shared__  // at namespace scope
#include "blocks/experts.cu"

constexpr int kMostExperts = 64;
int counts_e[2 * kMostExperts];

int main(int, char** argv) {
  auto number = [=](int i) { return std::atoi(argv[2 + i]); };
  if (argv[1][0] == 'g') {
    int pairs = number(0), local = number(1), experts = number(2), slots = number(3);
    auto ids = read<int>(pairs), local_ids = read<int>(local);
    auto source = poisoned(slots), place = poisoned(pairs);
    auto tiles = poisoned(4 * size_t(number(4))), count = poisoned(1);
    auto prepare = [] {
      std::fill(std::begin(counts_e), std::end(counts_e), -77777);
      std::memset(static_cast<void*>(&grouping), 0x55, sizeof grouping);
    };
    launch({u32(local), 1, 1}, kThreads, kWarps, prepare, [&] {
      group_by_expert(ids.data(), pairs, local_ids.data(), experts, source.data(), slots,
                      place.data(), reinterpret_cast<int4*>(tiles.data()), count.data(), number(5),
                      number(6), number(7));
    });
    for (auto* array : {&source, &place, &tiles, &count}) write(*array);
  } else {
    int tokens = number(0), h = number(1);
    auto outputs = read<F32>(size_t(number(2)) * h);
    auto place = read<int>(tokens * TAKEN);
    auto weights = read<float>(place.size());
    auto delta = poisoned(size_t(tokens) * h);
    launch({u32(tokens), 1, 1}, 64, 2, [] {}, [&] {
      combine_F32(outputs.data(), place.data(), weights.data(),
                  reinterpret_cast<float*>(delta.data()), h);
    });
    write(delta);
  }
}
