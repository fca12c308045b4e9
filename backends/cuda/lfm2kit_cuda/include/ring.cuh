// A ring of stages in shared memory: each passes from the threads that fill it to those that read it,
// and back (from sm_90 on).
#pragma once
#include "barrier.cuh"

constexpr int kMostStages = MOST_STAGES;

struct Ring {
  char* stages;
  u64 *filled, *read;  // a barrier per stage
  int count, bytes;    // of stages, of one
  int stage = 0;
  u32 parity = 0;

  __device__ char* at() const { return stages + stage * bytes; }
  __device__ void wait_until_filled() const { barrier_wait(filled + stage, parity); }
  __device__ void wait_until_read() const { barrier_wait(read + stage, parity ^ 1); }
  __device__ void next() { skip(1); }
  __device__ void skip(int stages) {  // no more than there are
    stage += stages;
    if (stage >= count) stage -= count, parity ^= 1;
  }
};
