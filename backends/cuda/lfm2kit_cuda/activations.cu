// Writes activations into slabs (slabs.cuh), where no other kernel leaves them there: rounded, placed
// if they are rounded already, split in three terms, or gathered.  A CTA per row of the slabs; row r is
// row source_m[r] of what is read (null: r itself), and where that is negative, nothing is written.  k
// elements per row, then zeros.
#include "dependent.cuh"
#include "slabs.cuh"

// The row that a CTA reads, or -1.
__device__ inline int source_row(const int* source_m) {
  wait_for_previous();
  let_next_start();
  return source_m ? source_m[blockIdx.x] : blockIdx.x;
}

__device__ inline int padded(int k) { return (k + kSlabK - 1) / kSlabK * kSlabK; }

template <class Kept>
__device__ void round_rows(const float* x_mk, Kept* slabs, int k, int extent) {
  int row = source_row(nullptr);
  for (int i = threadIdx.x; i < padded(k); i += blockDim.x)
    slabs[in_slabs(row, i, extent)] = Kept::from_float(i < k ? x_mk[size_t(row) * k + i] : 0);
}

extern "C" __global__ void round_BF16(const float* x_mk, BF16* slabs, int k, int extent) {
  round_rows(x_mk, slabs, k, extent);
}
extern "C" __global__ void round_F16(const float* x_mk, F16* slabs, int k, int extent) {
  round_rows(x_mk, slabs, k, extent);
}

// Places rows of 16 bits.
extern "C" __global__ void place_rows(const u16* x_mk, const int* source_m, u16* slabs, int k,
                                      int extent) {
  int row = source_row(source_m);
  if (row < 0) return;
  const u16* from = x_mk + size_t(row) * k;
  if (k % kChunk) {
    for (int i = threadIdx.x; i < padded(k); i += blockDim.x)
      slabs[in_slabs(blockIdx.x, i, extent)] = i < k ? from[i] : 0;
    return;
  }
  for (int i = threadIdx.x * kChunk; i < padded(k); i += blockDim.x * kChunk)
    *reinterpret_cast<uint4*>(slabs + in_slabs(blockIdx.x, i, extent)) =
        i < k ? *reinterpret_cast<const uint4*>(from + i) : uint4{};
}

// Splits x in three terms of BF16, whose exact sum is x: each is the nearest to what the terms before
// it leave.  Each term has slabs of its own.
extern "C" __global__ void split(const float* x_mk, const int* source_m, BF16* slabs, int k,
                                 int extent) {
  int row = source_row(source_m);
  if (row < 0) return;
  const float* from = x_mk + size_t(row) * k;
  for (int i = threadIdx.x * 2; i < padded(k); i += blockDim.x * 2) {
    float first = i < k ? from[i] : 0, second = i + 1 < k ? from[i + 1] : 0;
    BF16* to = slabs + in_slabs(blockIdx.x, i, extent);
    for (int term = 0; term < TERMS; ++term) {
      BF16 low = BF16::from_float(first), high = BF16::from_float(second);
      *reinterpret_cast<u32*>(to + term * size_t(padded(k)) * extent) = low.bits | high.bits << 16;
      first -= BF16::to_float(low);
      second -= BF16::to_float(high);
    }
  }
}

// Gathers rows of slabs that have `from_extent` rows.
extern "C" __global__ void gather(const uint4* from, const int* source_m, uint4* to, int k,
                                  int from_extent, int extent) {
  int row = source_row(source_m);
  if (row < 0) return;
  for (int i = threadIdx.x * kChunk; i < padded(k); i += blockDim.x * kChunk)
    to[in_slabs(blockIdx.x, i, extent) / kChunk] = from[in_slabs(row, i, from_extent) / kChunk];
}
