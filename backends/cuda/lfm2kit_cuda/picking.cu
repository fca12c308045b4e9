// Rows of arrays, picked by the ids in them and put back (picking.py).  r rows of k ids each.
//
// All elements are copied as they are: a Word is what is copied at once, and rows are whole words.
#include "dependent.cuh"
#include "types.cuh"

constexpr int kWarp = 32, kThreads = THREADS, kWarps = kThreads / kWarp, kArrays = 4;

struct alignas(4 * VECTOR) Word {
  u32 of[VECTOR];
};

struct Ids {
  const int* of_rk;
  int k;
  const int* is_wanted;  // by id, of those below `known`; no other id is wanted
  int known;

  __device__ bool are_wanted(int row) const {
    bool any = false;
    for (int i = 0; i < k; ++i) {
      int id = of_rk[size_t(row) * k + i];
      any |= id >= 0 && id < known && is_wanted[id];
    }
    return any;
  }
};

// Returns how many threads of the CTA before this one are `mine`, and sets `all` to how many there
// are.  All threads call it.
__device__ inline int counted_before(bool mine, int& all) {
  __shared__ int of_warps[kWarps];
  int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  u32 bits = __ballot_sync(~0u, mine);
  __syncthreads();  // the last call's numbers have been read
  if (lane == 0) of_warps[warp] = __popc(bits);
  __syncthreads();
  int before = __popc(bits & ((1u << lane) - 1));
  all = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += of_warps[w];
    all += of_warps[w];
  }
  return before;
}

// Copies rows picked[0], picked[1], ... behind each other.
__device__ inline void copy_rows(const Word* from, Word* to, int words, const int* picked,
                                 int count) {
  for (int i = threadIdx.x; i < count * words; i += kThreads) {
    int row = i / words, word = i % words;
    to[i] = from[size_t(picked[row]) * words + word];
  }
}

// Each CTA has a range of the rows, and counts the picked ones before it itself.
//   place_r[row]  where the row is among those picked; -1 if it is not
//   *count        how many are picked
extern "C" __global__ void __launch_bounds__(kThreads)
    pick_rows(const int* ids_rk, int rows, int k, const int* is_wanted, int known, const Word* a,
              const Word* b, const Word* c, const Word* d, Word* to_a, Word* to_b, Word* to_c,
              Word* to_d, int of_a, int of_b, int of_c, int of_d, int* place_r, int* count) {
  __shared__ int picked[kThreads];
  const Word* from[kArrays] = {a, b, c, d};
  Word* to[kArrays] = {to_a, to_b, to_c, to_d};
  int words[kArrays] = {of_a, of_b, of_c, of_d};
  Ids ids{ids_rk, k, is_wanted, known};
  int range = (rows + gridDim.x - 1) / gridDim.x;
  int begin = min(int(blockIdx.x) * range, rows), end = min(begin + range, rows);
  wait_for_previous();
  let_next_start();
  int before = 0, found;
  for (int first = 0; first < begin; first += kThreads) {
    int row = first + threadIdx.x;
    counted_before(row < begin && ids.are_wanted(row), found);
    before += found;
  }
  for (int first = begin; first < end; first += kThreads) {
    int row = first + threadIdx.x;
    bool is_picked = row < end && ids.are_wanted(row);
    int place = counted_before(is_picked, found);
    if (is_picked) picked[place] = row;
    if (row < end) place_r[row] = is_picked ? before + place : -1;
    __syncthreads();
    for (int n = 0; n < kArrays; ++n)
      copy_rows(from[n], to[n] + size_t(before) * words[n], words[n], picked, found);
    before += found;
    __syncthreads();  // the rows' numbers have been read
  }
  if (blockIdx.x == gridDim.x - 1 && threadIdx.x == 0) *count = before;
}

// A CTA per row: the row at its place, or zeros.
extern "C" __global__ void __launch_bounds__(kThreads)
    put_back(const Word* picked, const int* place_r, Word* all_rows, int words) {
  size_t row = blockIdx.x;
  wait_for_previous();
  let_next_start();
  int place = place_r[row];
  for (int i = threadIdx.x; i < words; i += kThreads) {
    Word word{};
    if (place >= 0) word = picked[size_t(place) * words + i];
    all_rows[row * words + i] = word;
  }
}
