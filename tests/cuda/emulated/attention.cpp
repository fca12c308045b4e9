// Runs the kernels of attention.cu on the host, one after the other:
//
//     attention TOKENS SEQUENCES MAX_SEQLEN WIDTH PAGES PAGE_TOKENS LAYERS
//         < ARRAYS > HEADS KEYS VALUES
//
// ARRAYS are qkv, the weights of the two norms, the inverse frequencies, positions, cu_seqlens, the
// table of pages, and the kept keys and values, all of 4 bytes an element and as the kernels take
// them.  PAGES is 0 without a state; LAYERS as in layers.cuh.
#include "f32.h"

inline void sincosf(float x, float* sin, float* cos) { *sin = std::sin(x), *cos = std::cos(x); }

#define __shared__ static
#include "blocks/attention.cu"

constexpr int kRotateThreads = 64;
constexpr float kEps = 1e-5f;

int main(int, char** argv) {
  auto number = [=](int i) { return std::atoi(argv[i]); };
  u32 tokens = number(1), sequences = number(2), longest = number(3);
  int width = number(4), pages = number(5), page_tokens = number(6);
  auto qkv = read<F32>(size_t(tokens) * kRow);
  auto q_weight = read<float>(HEAD_DIM), k_weight = read<float>(HEAD_DIM);
  auto inverse = read<float>(kHalf);
  auto positions = read<int>(tokens), ends = read<int>(sequences + 1);
  auto table = read<int>(size_t(sequences) * width);
  size_t kept = size_t(pages) * page_tokens * kKeys;
  auto keys = read<F32>(kept), values = read<F32>(kept);
  F32 *kept_keys = pages ? keys.data() : nullptr, *kept_values = pages ? values.data() : nullptr;
  std::vector<F32> heads(size_t(tokens) * kQueries);
  launch({tokens, 1, 1}, kRotateThreads, kRotateThreads / kWarp, [] {}, [&] {
    norm_and_rotate(qkv.data(), q_weight.data(), k_weight.data(), inverse.data(), positions.data(),
                    ends.data(), table.data(), kept_keys, kept_values, sequences, width,
                    page_tokens, kEps);
  });
  u32 layers = number(7), y = (sequences + layers - 1) / layers;
  Index grid{(longest + kRows - 1) / kRows, y, KV_HEADS * layers};
  launch(grid, kThreads, kWarps, [] {}, [&] {
    attend(qkv.data(), kept_keys, kept_values, positions.data(), ends.data(), table.data(),
           heads.data(), kQueries, sequences, width, page_tokens, 1 / std::sqrt(float(HEAD_DIM)));
  });
  write(heads), write(keys), write(values);
}
