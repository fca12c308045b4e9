// Which sequence a row belongs to.
#pragma once
#include "dependent.cuh"

// The sequence i with cu_seqlens[i] <= row < cu_seqlens[i + 1].  It is looked for at once where it
// is in a step of decoding, of a row for each sequence: a search takes several loads, each after the other.
// It may be asked for before the wait.
__device__ inline int sequence_of(int row, const int* cu_seqlens_s, int sequences) {
  int low = 0, high = sequences, likely = min(row, sequences - 1);
  int begin = early(cu_seqlens_s + likely), end = early(cu_seqlens_s + likely + 1);
  if (begin <= row && row < end) return likely;
  while (high - low > 1) {
    int middle = (low + high) / 2;
    if (early(cu_seqlens_s + middle) <= row) low = middle; else high = middle;
  }
  return low;
}
