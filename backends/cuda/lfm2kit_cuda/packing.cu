// Weights as the kernels read them, from matrices as checkpoints store them: [out, in] of F32,
// BF16 or F16.  Matrices may be interleaved: `run` rows of one, then `run` rows of the next, so
// row i of a matrix becomes row (i / run) * stride + offset + i % run of the packed one.
#include "slabs.cuh"
#include "types.cuh"

__device__ inline int packed_row(int i, int run, int stride, int offset) {
  return i / run * stride + offset + i % run;
}

// packed_pkc[row / panel][i][row % panel] = matrix_oi[row][i]: transposed, in panels of [k, panel];
// a CTA has 32 x 32 elements.
template <class Stored>
__device__ void transpose(const Stored* matrix_oi, float* packed_pkc, int out, int in, int k,
                          int panel, int run, int stride, int offset) {
  __shared__ float tile[32][33];
  int i0 = blockIdx.x * 32, k0 = blockIdx.y * 32, x = threadIdx.x % 32;
  for (int y = threadIdx.x / 32; y < 32; y += blockDim.x / 32)
    if (i0 + y < out && k0 + x < in)
      tile[y][x] = Stored::to_float(matrix_oi[size_t(i0 + y) * in + k0 + x]);
  __syncthreads();
  for (int y = threadIdx.x / 32; y < 32; y += blockDim.x / 32)
    if (i0 + x < out && k0 + y < in) {
      int row = packed_row(i0 + x, run, stride, offset);
      packed_pkc[(size_t(row / panel) * k + k0 + y) * panel + row % panel] = tile[x][y];
    }
}

// packed_ow[row][k] = matrix_oi[i][k] * scale, rows `width` apart; a CTA per row.
template <class Stored, class Kept>
__device__ void narrow(const Stored* matrix_oi, Kept* packed_ow, int in, int width, int run,
                       int stride, int offset, float scale) {
  const Stored* from = matrix_oi + size_t(blockIdx.x) * in;
  Kept* to = packed_ow + size_t(packed_row(blockIdx.x, run, stride, offset)) * width;
  for (int k = threadIdx.x; k < in; k += blockDim.x)
    to[k] = Kept::from_float(Stored::to_float(from[k]) * scale);
}

// Packs a matrix as Hopper's products read it (gemm90.cu): panels of 256 rows, each in slabs (slabs.cuh); row i *
// stride + offset of the packed matrix is row i of this one, times scale, and stands at its place in
// the panel.  A CTA per row of the matrix.
//
// Places are such that a thread, which gets the sums of four places from two instructions, has four
// neighbouring rows.
constexpr int kPanel = PANEL;
static_assert(kPanel == 256, "two halves of 128 rows: `place_of`");

__device__ inline int place_of(int row) {
  int half = row / 128 % 2, warp = row / 32 % 4, lane = row / 4 % 8;
  return (half * 2 + row / 2 % 2) * 64 + warp * 16 + row % 2 * 8 + lane;
}

template <class Stored, class Kept>
__device__ void panel(const Stored* matrix_oi, Kept* packed_psrk, int in, int steps,
                      int stride, int offset, float scale) {
  const Stored* from = matrix_oi + size_t(blockIdx.x) * in;
  int row = blockIdx.x * stride + offset;
  Kept* to = packed_psrk + size_t(row / kPanel) * steps * kPanel * kSlabK;
  for (int k = threadIdx.x; k < in; k += blockDim.x)
    to[in_slabs(place_of(row), k, kPanel)] = Kept::from_float(Stored::to_float(from[k]) * scale);
}

// *found = 1 if BF16 does not hold a value; a CTA per row.
template <class Stored>
__device__ void find_inexact(const Stored* matrix_oi, int in, int* found) {
  const Stored* row = matrix_oi + size_t(blockIdx.x) * in;
  for (int k = threadIdx.x; k < in; k += blockDim.x)
    if (__float_as_uint(Stored::to_float(row[k])) & 0xffffu) *found = 1;
}

#define NARROW(Stored, Kept)                                                                      \
  extern "C" __global__ void narrow_##Stored##_##Kept(const Stored* matrix, Kept* packed, int in, \
                                                      int width, int run, int stride, int offset, \
                                                      float scale) {                              \
    narrow(matrix, packed, in, width, run, stride, offset, scale);                                \
  }                                                                                               \
  extern "C" __global__ void panel_##Stored##_##Kept(const Stored* matrix, Kept* packed, int in,  \
                                                     int steps, int stride, int offset,           \
                                                     float scale) {                               \
    panel(matrix, packed, in, steps, stride, offset, scale);                                      \
  }
#define PACK(Stored)                                                                              \
  extern "C" __global__ void transpose_##Stored(const Stored* matrix, float* packed, int out,     \
                                                int in, int k, int panel, int run, int stride,    \
                                                int offset) {                                     \
    transpose(matrix, packed, out, in, k, panel, run, stride, offset);                            \
  }                                                                                               \
  extern "C" __global__ void find_inexact_##Stored(const Stored* matrix, int in, int* found) {    \
    find_inexact(matrix, in, found);                                                              \
  }                                                                                               \
  NARROW(Stored, BF16)                                                                            \
  NARROW(Stored, F16)
PACK(F32)
PACK(BF16)
PACK(F16)
