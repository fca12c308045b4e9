// The tile of a CTA of gemm16.cu, and where its operands lie in shared memory: with k inside, as rows
// of a slab (slabs.cuh).
#pragma once
#include "slabs.cuh"

constexpr int kTileK = kSlabK, kThreads = THREADS;
constexpr int kCopyRows = kThreads / kChunks;

struct Tile {
  int group, row, rows, column;
};

__device__ inline u32 swizzled(int row, int chunk) {  // in bytes
  return (row * kChunks + (chunk ^ (row % 8))) * 16;
}
