// Runs the kernels of short_conv.cu on the host, one after the other:
//
//     short_conv TOKENS SEQUENCES H WIDTH PAGES PAGE_TOKENS REACHED < ARRAYS > RESULT PAST
//
// ARRAYS are bcx, taps, positions, cu_seqlens, the table of pages, and the kept rows, all of 4 bytes
// an element and as the kernels take them.  PAGES is 0 without a state.  REACHED is how many
// pages a chunk reaches; each has a launch of its own, as beyond 65535 pages.  With 0, `convolve` keeps
// the rows.
#include "f32.h"

#include "blocks/short_conv.cu"

constexpr int kThreads = 32;

int main(int, char** argv) {
  auto number = [=](int i) { return std::atoi(argv[i]); };
  u32 tokens = number(1), sequences = number(2), reached = number(7);
  int h = number(3), width = number(4), pages = number(5), page_tokens = number(6);
  auto bcx = read<F32>(size_t(tokens) * 3 * h);
  auto taps = read<float>(size_t(KERNEL_SIZE) * h);
  auto positions = read<int>(tokens), ends = read<int>(sequences + 1);
  auto table = read<int>(size_t(sequences) * width);
  auto past = read<float>(size_t(pages) * WINDOW * h);
  std::vector<F32> out(size_t(tokens) * h);
  u32 ctas = (h + kThreads * VECTOR - 1) / (kThreads * VECTOR);
  launch({(tokens + kRows - 1) / kRows, ctas, 1}, kThreads, 1, [] {}, [&] {
    convolve(bcx.data(), taps.data(), nullptr, positions.data(), ends.data(), table.data(),
             pages ? past.data() : nullptr, out.data(), pages && !reached, sequences, width,
             page_tokens, tokens, h, h);
  });
  for (u32 skipped = 0; pages && skipped < reached; ++skipped)
    launch({sequences, ctas, 1}, kThreads, 1, [] {}, [&] {
      remember(bcx.data(), positions.data(), ends.data(), table.data(), past.data(), skipped,
               width, page_tokens, h);
    });
  write(out), write(past);
}
