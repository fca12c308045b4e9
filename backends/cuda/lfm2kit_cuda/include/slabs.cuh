// Operands of 16 bits as the products read them: slabs of 64 k, and in each all rows, 128 bytes long,
// whose 16-byte chunks are swizzled as they are to lie in shared memory: chunk c of row r stands at
// c ^ (r % 8).  What a tile reads of a slab are consecutive bytes, and if the tile's first row is a
// multiple of eight, they can be copied as they are.
#pragma once
#include "types.cuh"

constexpr int kSlabK = SLAB;
constexpr int kChunk = CHUNK, kChunks = kSlabK / kChunk;  // elements of 16 bytes, chunks of a row

// Where element k of a row stands, with `extent` rows in a slab.
__device__ __forceinline__ size_t in_slabs(int row, int k, int extent) {
  return (size_t(k / kSlabK) * extent + row) * kSlabK + (k / kChunk ^ row) % kChunks * kChunk +
         k % kChunk;
}

// The same of what a block leaves for the next product: float32 stays in rows of `extent` elements.
template <class Stored>
__device__ __forceinline__ Stored* activation_at(Stored* all, int row, int k, int extent) {
  if constexpr (sizeof(Stored) == sizeof(float)) return all + size_t(row) * extent + k;
  else return all + in_slabs(row, k, extent);
}
