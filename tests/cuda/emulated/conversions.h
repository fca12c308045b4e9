// The two instructions of types.cuh that convert F16, on a host.
#pragma once
#include "device.h"

// As cvt.rn.f16.f32: to nearest, ties to even.
inline u16 nearest_half(float x) {
  if (x != x) return 0x7fff;
  u16 sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isinf(x)) return sign | 0x7c00;
  int exponent;
  std::frexp(x, &exponent);
  exponent = x == 0 ? -14 : std::max(exponent - 1, -14);
  int steps = int(std::nearbyint(std::ldexp(std::fabs(x), 10 - exponent)));
  return u16(sign | std::min(steps + ((exponent + 14) << 10), 0x7c00));
}

// As cvt.f32.f16.
inline float value_of_half(u16 bits) {
  int exponent = bits >> 10 & 31, steps = bits & 1023;
  float value = exponent == 31 ? (steps ? NAN : INFINITY)
                               : std::ldexp(float(steps + (exponent ? 1024 : 0)), std::max(exponent, 1) - 25);
  return bits & 0x8000 ? -value : value;
}
