// The tile of a block of gemm16.cu, and where its operands lie in shared memory, with k inside, 64
// elements in a row of 128 bytes, whose 16-byte chunks are swizzled: chunk c of row r stands at
// c ^ (r % 8).
#pragma once
#include "types.cuh"

constexpr int kTileK = 64, kThreads = 256;
constexpr int kChunk = 8, kChunks = kTileK / kChunk;  // elements of 16 bytes
constexpr int kCopyRows = kThreads / kChunks;

struct Tile {
  int group, row, rows, column;
};

__device__ inline u32 swizzled(int row, int chunk) {  // in bytes
  return (row * kChunks + (chunk ^ (row % 8))) * 16;
}
