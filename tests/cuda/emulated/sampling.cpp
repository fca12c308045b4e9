// Draws tokens with the kernel of sampling.cu on the host:
//
//     sampling ASKING ROWS VOCAB IDS BIASES WORDS NEWEST < ASKED, IDS, BIASES, WORDS, LOGITS, NEWEST
//
// What comes out are the tokens, -100 for a row that asks nothing; the ids that take the place of errors;
// and how many counts are not 0 then.
#include "f32.h"

inline u32 atomicAdd(u32* at, u32 more) { return std::atomic_ref<u32>(*at).fetch_add(more); }
inline int atomicExch(int* at, int value) { return std::atomic_ref<int>(*at).exchange(value); }

#include "sampling.cu"

int main(int, char** argv) {
  auto number = [=](int i) { return std::atoi(argv[1 + i]); };
  int asking = number(0), rows = number(1), vocab = number(2);
  auto asked = read<Asked>(asking);
  auto ids = read<int>(number(3));
  auto biases = read<float>(number(4));
  auto words = read<u32>(number(5));
  auto logits = read<float>(size_t(rows) * vocab);
  auto newest = read<int>(number(6));
  std::vector<float> changed(logits.size(), __uint_as_float(0x7fc00000));
  std::vector<int> counts(logits.size()), tokens(rows, -100), valid(rows, -100);
  launch({u32(asking), 1, 1}, kThreads, kWarps, [] {}, [&] {
    draw_tokens(logits.data(), vocab, asked.data(), ids.data(), biases.data(), words.data(),
                newest.empty() ? nullptr : newest.data(), changed.data(), counts.data(), tokens.data(),
                valid.data());
  }, kCtas);
  tokens.insert(tokens.end(), valid.begin(), valid.end());
  tokens.push_back(int(logits.size() - std::count(counts.begin(), counts.end(), 0)));
  write(tokens);
}
