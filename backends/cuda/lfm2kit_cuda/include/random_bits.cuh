// The random number of a draw.
#pragma once
#include "types.cuh"

constexpr u32 kAll = 0xffffffffu;

// Returns 64 random bits for a position: Philox4x32-10, as in lfm2kit.engine.random_numbers.
__device__ inline u64 bits_of_draw(u64 seed, u64 position) {
  u32 a = u32(position), b = 0, c = 0, d = 0, left = u32(seed), right = u32(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    u64 first = 0xd2511f53ull * a, second = 0xcd9e8d57ull * c;
    a = u32(second >> 32) ^ b ^ left, b = u32(second);
    c = u32(first >> 32) ^ d ^ right, d = u32(first);
    left += 0x9e3779b9u, right += 0xbb67ae85u;
  }
  return u64(b) << 32 | a;
}

// Returns the upper 64 bits of a product.
__device__ inline u64 high(u64 a, u64 b) {
  u64 low = (a & kAll) * (b & kAll) >> 32, middle = (a >> 32) * (b & kAll) + low;
  u64 other = (a & kAll) * (b >> 32) + (middle & kAll);
  return (a >> 32) * (b >> 32) + (middle >> 32) + (other >> 32);
}
