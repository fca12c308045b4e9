// Draws tokens with the kernel of sampling.cu on the host:
//
//     sampling ASKING ROWS VOCAB RECORDS IDS BIASES MASKS NEWEST < ASKED, LOGITS, NEWEST
//
// RECORDS to MASKS are how many words there are of each in ASKED, which has them in this order.
// What comes out are the tokens, -100 for a row that asks nothing; the ids that take the place of errors;
// and how many counts are not 0 then.
#include "f32.h"

inline u32 atomicAdd(u32* at, u32 more) { return std::atomic_ref<u32>(*at).fetch_add(more); }
inline int atomicExch(int* at, int value) { return std::atomic_ref<int>(*at).exchange(value); }

#include "sampling.cu"

int main(int, char** argv) {
  auto number = [=](int i) { return std::atoi(argv[1 + i]); };
  int asking = number(0), rows = number(1), vocab = number(2);
  int first_id = number(3), first_bias = first_id + number(4), first_word = first_bias + number(5);
  auto asked = read<u32>(first_word + number(6));
  auto logits = read<float>(size_t(rows) * vocab);
  auto newest = read<int>(number(7));
  std::vector<float> changed(logits.size(), __uint_as_float(0x7fc00000));
  std::vector<int> counts(logits.size()), tokens(rows, -100), valid(rows, -100);
  launch({u32(asking), 1, 1}, kThreads, kWarps, [] {}, [&] {
    draw_tokens(logits.data(), vocab, asked.data(), first_id, first_bias, first_word,
                newest.empty() ? nullptr : newest.data(), changed.data(), counts.data(), tokens.data(),
                valid.data());
  }, kCtas);
  tokens.insert(tokens.end(), valid.begin(), valid.end());
  tokens.push_back(int(logits.size() - std::count(counts.begin(), counts.end(), 0)));
  write(tokens);
}
