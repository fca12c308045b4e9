// What kernels write into: arrays of what none of them writes, with a margin that is to stay as it is.
#pragma once
#include <vector>

constexpr int kMargin = 64;

// Of 4 bytes an element; as a float, each is a NaN.
inline std::vector<int> poisoned(size_t count) { return std::vector<int>(count + kMargin, -77777); }
