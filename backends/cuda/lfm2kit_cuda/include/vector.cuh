// VECTOR floats that are read and written at once: 4 where the length of a row allows it, else 1.
#pragma once

struct alignas(4 * VECTOR) Vector {
  float of[VECTOR];
};

__device__ inline Vector load(const float* at) { return *reinterpret_cast<const Vector*>(at); }
__device__ inline void store(float* at, Vector v) { *reinterpret_cast<Vector*>(at) = v; }

// The same as `Stored`, the type of what lies between the kernels of a block.
template <class Stored>
struct alignas(sizeof(Stored) * VECTOR) Narrow {
  Stored of[VECTOR];
};
template <class Stored>
__device__ inline Vector load(const Stored* at) {
  Narrow<Stored> narrow = *reinterpret_cast<const Narrow<Stored>*>(at);
  Vector v;
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) v.of[i] = Stored::to_float(narrow.of[i]);
  return v;
}
template <class Stored>
__device__ inline void store(Stored* at, Vector v) {
  Narrow<Stored> narrow;
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) narrow.of[i] = Stored::from_float(v.of[i]);
  *reinterpret_cast<Narrow<Stored>*>(at) = narrow;
}
