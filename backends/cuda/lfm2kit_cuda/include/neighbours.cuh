// An even number of neighbours of a row, as products store them: rounded to nearest even where
// `Stored` has 16 bits.
#pragma once
#include "types.cuh"

template <class Stored, int count>
struct alignas(count * sizeof(Stored)) Neighbours {
  u32 pairs[count / 2];

  Neighbours() = default;
  __device__ explicit Neighbours(const float (&values)[count]) {
#pragma unroll
    for (int i = 0; i < count / 2; ++i) pairs[i] = Stored::both(values[2 * i], values[2 * i + 1]);
  }
  __device__ Stored at(int i) const { return Stored{u16(pairs[i / 2] >> i % 2 * 16)}; }
};

template <int count>
struct alignas(count * sizeof(F32)) Neighbours<F32, count> {
  float of[count];

  Neighbours() = default;
  __device__ explicit Neighbours(const float (&values)[count]) {
#pragma unroll
    for (int i = 0; i < count; ++i) of[i] = values[i];
  }
  __device__ F32 at(int i) const { return F32{of[i]}; }
};

// Stores the first `columns` of them; all at once if `are_whole`: every row has whole ones.
template <class Stored, int count>
__device__ __forceinline__ void store_neighbours(Stored* to,
                                                 const Neighbours<Stored, count>& neighbours,
                                                 int columns, bool are_whole) {
  if (are_whole) {
    if (columns > 0) *reinterpret_cast<Neighbours<Stored, count>*>(to) = neighbours;
  } else {
#pragma unroll
    for (int i = 0; i < count; ++i)
      if (i < columns) to[i] = neighbours.at(i);
  }
}
