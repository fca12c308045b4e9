// Which sequence a row belongs to.
#pragma once

// The sequence i with cu_seqlens[i] <= row < cu_seqlens[i + 1].
__device__ inline int sequence_of(int row, const int* cu_seqlens_s, int sequences) {
  int low = 0, high = sequences;
  while (high - low > 1) {
    int middle = (low + high) / 2;
    if (cu_seqlens_s[middle] <= row) low = middle; else high = middle;
  }
  return low;
}
