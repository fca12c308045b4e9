// Draws tokens with the kernel of sampling.cu on the host:
//
//     sampling ROWS VOCAB IDS BIASES WORDS < ASKED, IDS, BIASES, WORDS AND LOGITS
//
// What comes out are the tokens, and how many counts are not 0 then.
#include "f32.h"

inline u64 atomicAdd(u64* at, u64 more) { return std::atomic_ref<u64>(*at).fetch_add(more); }
inline int atomicExch(int* at, int value) { return std::atomic_ref<int>(*at).exchange(value); }

#define __shared__ static  // CTAs run one after the other
#include "sampling.cu"

int main(int, char** argv) {
  auto number = [=](int i) { return std::atoi(argv[1 + i]); };
  int rows = number(0), vocab = number(1);
  auto asked = read<Asked>(rows);
  auto ids = read<int>(number(2));
  auto biases = read<float>(number(3));
  auto words = read<u32>(number(4));
  auto logits = read<float>(size_t(rows) * vocab);
  std::vector<float> changed(logits.size(), __uint_as_float(0x7fc00000));
  std::vector<int> counts(logits.size()), tokens(rows, -100);
  launch({u32(rows), 1, 1}, kThreads, kWarps, [] {}, [&] {
    draw_tokens(logits.data(), vocab, asked.data(), ids.data(), biases.data(), words.data(),
                changed.data(), counts.data(), tokens.data());
  });
  tokens.push_back(int(logits.size() - std::count(counts.begin(), counts.end(), 0)));
  write(tokens);
}
