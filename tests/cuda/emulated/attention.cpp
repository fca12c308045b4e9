// Runs the kernels of rotation.cu and attention.cu on the host, one after the other:
//
//     attention TOKENS SEQUENCES MAX_SEQLEN WIDTH PAGES PAGE_TOKENS LAYERS PARTS CTAS
//         < ARRAYS > HEADS KEYS VALUES
//
// ARRAYS are qkv, the weights of the two norms, the inverse frequencies, positions, cu_seqlens, the
// table of pages, and the kept keys and values, all of 4 bytes an element; those of type INNER are
// rounded here.  PAGES is 0 without a state; LAYERS as in layers.cuh.  If PARTS is not 0, CTAS of them
// share the parts of each row.
#include "f32.h"

#include <limits>

#include "conversions.h"
#include "halves.h"

inline void sincosf(float x, float* sin, float* cos) { *sin = std::sin(x), *cos = std::cos(x); }

#define __shared__  // at namespace scope
#include "blocks/rotation.cu"

#include "blocks/attention.cu"

constexpr size_t kSharedFloats = (std::max(sizeof(Whole), sizeof(Shared)) + 3) / 4;
__align__(128) float shared[kSharedFloats];

constexpr int kRotateThreads = 64;
constexpr float kEps = 1e-5f, kNan = std::numeric_limits<float>::quiet_NaN();

// Called before each CTA: what was in shared memory before it is no number.
inline void spoil_shared() { std::fill_n(shared, kSharedFloats, kNan); }

std::vector<INNER> read_inner(size_t count) {
  std::vector<INNER> inner;
  for (float x : read<float>(count)) inner.push_back(INNER::from_float(x));
  return inner;
}

void write_inner(const std::vector<INNER>& inner) {
  std::vector<float> wide;
  for (INNER x : inner) wide.push_back(INNER::to_float(x));
  write(wide);
}

int main(int, char** argv) {
  auto number = [=](int i) { return std::atoi(argv[i]); };
  u32 tokens = number(1), sequences = number(2), longest = number(3);
  int width = number(4), pages = number(5), page_tokens = number(6), most_parts = number(8);
  auto qkv = read_inner(size_t(tokens) * kRow);
  auto q_weight = read<float>(HEAD_DIM), k_weight = read<float>(HEAD_DIM);
  auto inverse = read<float>(kHalf);
  auto positions = read<int>(tokens), ends = read<int>(sequences + 1);
  auto table = read<int>(size_t(sequences) * width);
  size_t kept = size_t(pages) * page_tokens * kKeys;
  auto keys = read_inner(kept), values = read_inner(kept);
  INNER *kept_keys = pages ? keys.data() : nullptr, *kept_values = pages ? values.data() : nullptr;
  constexpr u32 kRotateWarps = kRotateThreads / kWarp, kWarpsOfRow = HEADS + 2 * KV_HEADS;
  Index grid{tokens, (kWarpsOfRow + kRotateWarps - 1) / kRotateWarps, 1};
  launch(grid, kRotateThreads, kRotateWarps, [] {}, [&] {
    norm_and_rotate(qkv.data(), q_weight.data(), k_weight.data(), inverse.data(), positions.data(),
                    ends.data(), table.data(), kept_keys, kept_values, sequences, width,
                    page_tokens, kEps);
  });
  int extent = sizeof(INNER) == 4 ? kQueries : int(tokens);  // of a row, or of a slab's rows
  std::vector<INNER> heads(size_t(tokens) * ((kQueries + kSlabK - 1) / kSlabK * kSlabK));
  float scale = 1 / std::sqrt(float(HEAD_DIM));
  if (most_parts) {
    std::vector<Kept> parts(size_t(tokens) * HEADS * most_parts);
    std::fill_n(reinterpret_cast<float*>(parts.data()), parts.size() * sizeof(Kept) / 4, kNan);
    std::vector<u32> arrived(tokens * KV_HEADS);
    launch({tokens, u32(number(9)), KV_HEADS}, kThreads, kWarps, spoil_shared, [&] {
      attend_parts(qkv.data(), kept_keys, kept_values, positions.data(), ends.data(), table.data(),
                   parts.data(), arrived.data(), heads.data(), extent, sequences, width,
                   page_tokens, most_parts, scale);
    });
    for (u32 count : arrived)
      if (count) return 2;  // the next launch would count from here
  } else {
    u32 layers = number(7), y = (sequences + layers - 1) / layers;
    Index grid{(longest + kRows - 1) / kRows, y, KV_HEADS * layers};
    launch(grid, kThreads, kWarps, spoil_shared, [&] {
      attend(qkv.data(), kept_keys, kept_values, positions.data(), ends.data(), table.data(),
             heads.data(), extent, sequences, width, page_tokens, scale);
    });
  }
  std::vector<INNER> rows;
  for (u32 row = 0; row < tokens; ++row)
    for (int k = 0; k < kQueries; ++k) rows.push_back(*activation_at(heads.data(), row, k, extent));
  write_inner(rows), write_inner(keys), write_inner(values);
}
