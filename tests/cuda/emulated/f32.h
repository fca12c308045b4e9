// The type INNER of kernels that run on a host, and their arrays on standard input.
#pragma once
#include "warps.h"

#include <cstdio>
#include <cstdlib>

struct F32 {
  static constexpr int kPerWord = 1;
  float value;
  static float to_float(F32 x) { return x.value; }
  static F32 from_float(float x) { return F32{x}; }
  static void widen(u32 word, float* to) { *to = __uint_as_float(word); }
};

template <class T>
std::vector<T> read(size_t count) {
  std::vector<T> array(count);
  if (std::fread(array.data(), sizeof(T), count, stdin) != count) std::exit(1);
  return array;
}

template <class T>
void write(const std::vector<T>& array) {
  std::fwrite(array.data(), sizeof(T), array.size(), stdout);
}
