// The types that weights are stored as, and their exact values as float.  No CUDA header is
// included anywhere: NVRTC then needs none to be installed.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct F32 {
  static constexpr int kPerWord = 1;
  float value;
  __device__ static float to_float(F32 x) { return x.value; }
  __device__ static F32 from_float(float x) { return F32{x}; }
  // The values of the elements of a word.
  __device__ static void widen(u32 word, float* to) { *to = __uint_as_float(word); }
};

struct BF16 {
  static constexpr int kPerWord = 2;
  u16 bits;
  __device__ static float to_float(BF16 x) { return __uint_as_float(u32(x.bits) << 16); }
  __device__ static BF16 from_float(float x) {  // to nearest even; a NaN stays one
    u32 bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return BF16{u16(bits >> 16 | 0x40u)};
    return BF16{u16((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
  }
  __device__ static u32 both(float x, float y) {  // of two neighbours, rounded alike
    u32 bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(y), "f"(x));
    return bits;
  }
  __device__ static void widen(u32 word, float* to) {
    to[0] = __uint_as_float(word << 16), to[1] = __uint_as_float(word & 0xffff0000u);
  }
};

struct F16 {
  static constexpr int kPerWord = 2;
  u16 bits;
  __device__ static float to_float(F16 x) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
    return value;
  }
  // What is too large becomes the largest, 65504; what is not finite stays so.
  __device__ static F16 from_float(float x) {
    F16 half;
    if (x - x == 0) x = fminf(fmaxf(x, -65504.0f), 65504.0f);
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half.bits) : "f"(x));
    return half;
  }
  __device__ static u32 both(float x, float y) {
    return u32(from_float(x).bits) | u32(from_float(y).bits) << 16;
  }
  __device__ static void widen(u32 word, float* to) {
    to[0] = to_float(F16{u16(word)}), to[1] = to_float(F16{u16(word >> 16)});
  }
};
