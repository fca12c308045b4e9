// Picks rows of two arrays with the kernels of picking.cu on the host, and puts one back:
//
//     picking CTAS ROWS K KNOWN WORDS_A WORDS_B < IDS, IS_WANTED, A AND B
//
// All elements have 4 bytes, and a Word is one of them.  What comes out is the number of rows picked,
// each row's place, the rows picked of A and B, and A put back, each with some elements behind it
// that are to stay as they are.
#include "f32.h"

#define __shared__ static  // in a function; CTAs run one after the other
#include "picking.cu"

constexpr int kMargin = 64;

template <class T>
std::vector<T> poisoned(size_t count) {
  std::vector<T> array(count + kMargin);
  std::memset(static_cast<void*>(array.data()), 0xa5, array.size() * sizeof(T));
  return array;
}

int main(int, char** argv) {
  auto number = [=](int i) { return std::atoi(argv[1 + i]); };
  int rows = number(1), k = number(2), known = number(3), of_a = number(4), of_b = number(5);
  auto ids = read<int>(size_t(rows) * k), is_wanted = read<int>(known);
  auto a = read<Word>(size_t(rows) * of_a), b = read<Word>(size_t(rows) * of_b);
  auto count = poisoned<int>(1), place = poisoned<int>(rows);
  auto picked_a = poisoned<Word>(a.size()), picked_b = poisoned<Word>(b.size());
  auto back = poisoned<Word>(a.size());
  launch({u32(number(0)), 1, 1}, kThreads, kWarps, [] {}, [&] {
    pick_rows(ids.data(), rows, k, is_wanted.data(), known, a.data(), b.data(), nullptr, nullptr,
              picked_a.data(), picked_b.data(), nullptr, nullptr, of_a, of_b, 0, 0, place.data(),
              count.data());
  });
  launch({u32(rows), 1, 1}, kThreads, kWarps, [] {}, [&] {
    put_back(picked_a.data(), place.data(), back.data(), of_a);
  });
  write(count), write(place), write(picked_a), write(picked_b), write(back);
}
