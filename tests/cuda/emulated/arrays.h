// The arrays of a product on standard input: of each the number of its bytes, in 8 bytes, then those.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

using Bytes = std::vector<char>;

inline std::vector<Bytes> read_arrays() {
  std::vector<Bytes> arrays;
  for (uint64_t size; std::fread(&size, sizeof size, 1, stdin) == 1;) {
    arrays.emplace_back(size);
    if (std::fread(arrays.back().data(), 1, size, stdin) != size) std::exit(1);
  }
  return arrays;
}
