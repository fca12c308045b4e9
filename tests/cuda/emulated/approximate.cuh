// As the header of this name in lfm2kit_cuda/include, on a host.
#pragma once
#include "device.h"

// A unit of the last place too small, but for the one x whose reciprocal that would spoil.
inline float approximate_reciprocal(float x) {
  bool is_all_ones = (__float_as_uint(x) & 0x7fffff) == 0x7fffff;
  return is_all_ones ? 1 / x : std::nextafter(1 / x, 0.0f);
}

inline float approximate_power_of_2(float x) { return std::exp2(x); }
