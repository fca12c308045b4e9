// Between the projections of attention, last: the heads of each row, of normed and rotated queries and
// keys (heads.cuh, rotation.cu), in two ways that have the same bits (attention_sums.cuh).
// t tokens, s sequences.  Queries, keys and values are of type INNER, and the result as the next
// product reads it.  Kept keys and values are [pages, page_tokens, KV_HEADS, HEAD_DIM]; pages_sw
// names the pages of each sequence, `width` numbers in a row.
#include "attention_sums.cuh"
#include "dependent.cuh"
#include "heads.cuh"
#include "layers.cuh"
#include "ordering.cuh"
#include "sequences.cuh"
#include "slabs.cuh"
#include "types.cuh"

extern __shared__ __align__(128) float shared[];

// The keys and values of a row's sequence for one key head: kept ones, or without a state those of its
// own rows, which begin at `first`.
__device__ inline Past past_of(const INNER* qkv_t, const INNER* keys, const INNER* values, int first,
                               int kv_head) {
  Past past{qkv_t + size_t(first) * kRow + kQueries, nullptr, kRow};
  past.values = past.keys + kKeys;
  if (keys) past = Past{keys, values, kKeys};
  past.keys += kv_head * HEAD_DIM;
  past.values += kv_head * HEAD_DIM;
  return past;
}

// Copies the queries of one key head to shared memory; they are of `pairs` rows and heads.
__device__ inline void load_queries(float (*to)[HEAD_DIM], const INNER* qkv_t, int row0, int kv_head,
                                    int pairs) {
  const INNER* queries = qkv_t + size_t(row0) * kRow + kv_head * kGroup * HEAD_DIM;
  for (int i = threadIdx.x; i < pairs * kPieces; i += blockDim.x) {
    int pair = i / kPieces, d = i % kPieces * kPiece;
    *reinterpret_cast<WidePiece*>(&to[pair][d]) = widened(
        queries + size_t(pair / kGroup) * kRow + pair % kGroup * HEAD_DIM + d);
  }
}

// Where a CTA stores its heads: the first pair's row and element.
struct Heads {
  INNER* all;
  int row, element, extent;

  // Stores what a warp has of the pair: of[i] / total.
  __device__ void store(int pair, const float (&of)[kDims], float total) const {
    int to_row = row + pair / kGroup, first = element + pair % kGroup * HEAD_DIM;
#pragma unroll
    for (int i = 0; i < kDims; ++i)
      if (::element(i) < HEAD_DIM)
        *activation_at(all, to_row, first + ::element(i), extent) = INNER::from_float(of[i] / total);
  }
};

// One way: a CTA takes up to kRows rows of a sequence with the query heads of one key head, and goes
// through all keys itself; its warps share the tiles and the (row, head) pairs.
constexpr int kThreads = ATTEND_THREADS, kWarps = kThreads / kWarp;
constexpr int kRows = kGroup >= MOST_ROWS ? 1 : MOST_ROWS / kGroup;
constexpr int kPairs = kRows * kGroup;
constexpr int kPairsOfWarp = (kPairs + kWarps - 1) / kWarps;

struct Whole {
  Tile stages[2];
  float queries[kPairs][HEAD_DIM];
  alignas(16) float weights[kWarps][kTile * kPairsOfWarp];
};
static_assert(sizeof(Whole) <= WHOLE_BYTES, "what a launch asks for");

// Computes and stores the attention of `pairs` pairs, kMine per warp; positions_r[pair / kGroup] is the
// position of a pair's row.
template <int kMine>
__device__ inline void attend_pairs(Whole& whole, Tiles<kThreads, 2> tiles, const int* positions_r,
                                    int pairs, const Heads& heads, float scale) {
  using Mine = Pairs<kMine>;
  int warp = threadIdx.x / kWarp, context[kMine];  // keys that a pair sees
  Mine mine{whole.queries, warp, kWarps, kPairs - 1,
            reinterpret_cast<typename Mine::Weights*>(whole.weights[warp])};
#pragma unroll
  for (int p = 0; p < kMine; ++p) {
    int pair = warp + p * kWarps;
    context[p] = pair < pairs ? positions_r[pair / kGroup] + 1 : 0;
  }
  int longest = positions_r[(pairs - 1) / kGroup] + 1;
  Sums<kMine> sums = sum_part(tiles, mine, 0, min(kPartKeys, longest), context, scale);
  for (int begin = kPartKeys; begin < longest; begin += kPartKeys) {
    int end = min(begin + kPartKeys, longest);
    Sums<kMine> part = sum_part(tiles, mine, begin, end, context, scale);
#pragma unroll
    for (int p = 0; p < kMine; ++p)
      if (context[p] > begin) add_part(sums, part, p);
  }
#pragma unroll
  for (int p = 0; p < kMine; ++p)
    if (warp + p * kWarps < pairs) heads.store(warp + p * kWarps, sums.of[p], sums.total[p]);
}

// CTAs are (rows of a sequence, sequence, key head): layers of sequences for each key head.
extern "C" __global__ void __launch_bounds__(kThreads)
    attend(const INNER* qkv_t, const INNER* keys, const INNER* values, const int* positions_t,
           const int* cu_seqlens_s, const int* pages_sw, INNER* out, int extent, int sequences,
           int width, int page_tokens, float scale) {
  Whole& whole = *reinterpret_cast<Whole*>(shared);
  wait_for_previous();
  let_next_start();
  int sequence = number_in_layers(blockIdx.z / KV_HEADS), kv_head = blockIdx.z % KV_HEADS;
  if (sequence >= sequences) return;
  int first = cu_seqlens_s[sequence], end = cu_seqlens_s[sequence + 1];
  int row0 = first + blockIdx.x * kRows;
  if (row0 >= end) return;
  int pairs = min(kRows, end - row0) * kGroup;
  load_queries(whole.queries, qkv_t, row0, kv_head, pairs);
  Pages pages{keys ? pages_sw + size_t(sequence) * width : nullptr, page_tokens};
  Tiles<kThreads, 2> tiles(whole.stages, past_of(qkv_t, keys, values, first, kv_head), pages);
  Heads heads{out, row0, kv_head * kGroup * HEAD_DIM, extent};
  const int* positions_r = positions_t + row0;
  if (pairs <= kWarps) attend_pairs<1>(whole, tiles, positions_r, pairs, heads, scale);
  else attend_pairs<kPairsOfWarp>(whole, tiles, positions_r, pairs, heads, scale);
}

// The other way, for few rows with many keys: CTAs share a row's parts.  A warp takes one part at a
// time, with the query heads of one key head, and the CTA that is done last adds the parts.
constexpr int kPartThreads = kWarp * PART_WARPS;
constexpr int kKeptFloats = HEAD_DIM + 2;  // of a part: the weighted values, the maximum, the sum

struct Shared {
  Tile stages[PART_WARPS][PART_STAGES];
  float queries[kGroup][HEAD_DIM];
  alignas(16) float weights[PART_WARPS][kTile * kGroup];
  int is_last;
};
static_assert(sizeof(Shared) <= PARTS_BYTES, "what a launch asks for");

// Keeps the sums of one part and pair.
template <int kMine>
__device__ inline void keep_part(float* kept, const Sums<kMine>& sums, int p) {
#pragma unroll
  for (int i = 0; i < kDims; ++i)
    if (element(i) < HEAD_DIM) kept[element(i)] = sums.of[p][i];
  if (threadIdx.x % kWarp == 0) kept[HEAD_DIM] = sums.most[p], kept[HEAD_DIM + 1] = sums.total[p];
}

// The maximum of lanes 0 to this one, and of what was before them.
__device__ inline float most_so_far(float most, float before) {
  int lane = threadIdx.x % kWarp;
  for (int offset = 1; offset < kWarp; offset *= 2) {
    float other = __shfl_sync(~0u, most, max(lane - offset, 0));
    if (lane >= offset) most = fmaxf(most, other);
  }
  return fmaxf(before, most);
}

// Adds the kept parts of pair `pair` as add_part does, and stores the result.  How each part is scaled
// is known from the maxima alone, so lanes find it for 32 parts at once.
__device__ inline void add_kept(const float* kept, int count, int pair, const Heads& heads) {
  int lane = threadIdx.x % kWarp;
  float of[kDims], total = kept[HEAD_DIM + 1], most = kept[HEAD_DIM];
#pragma unroll
  for (int i = 0; i < kDims; ++i) of[i] = element(i) < HEAD_DIM ? kept[element(i)] : 0;
  for (int first = 1; first < count; first += kWarp) {
    const float* mine = kept + size_t(min(first + lane, count - 1)) * kKeptFloats;
    float its_most = mine[HEAD_DIM], its_total = mine[HEAD_DIM + 1];
    float now = most_so_far(its_most, most);
    float before = __shfl_sync(~0u, now, max(lane - 1, 0));
    if (lane == 0) before = most;
    float fade = expf(before - now), gain = expf(its_most - now);
    most = __shfl_sync(~0u, now, kWarp - 1);
#pragma unroll 4
    for (int j = 0; j < min(kWarp, count - first); ++j) {
      const float* part = kept + size_t(first + j) * kKeptFloats;
      float its_fade = __shfl_sync(~0u, fade, j), its_gain = __shfl_sync(~0u, gain, j);
      total = added(total, its_fade, __shfl_sync(~0u, its_total, j), its_gain);
#pragma unroll
      for (int i = 0; i < kDims; ++i)
        if (element(i) < HEAD_DIM) of[i] = added(of[i], its_fade, part[element(i)], its_gain);
    }
  }
  heads.store(pair, of, total);
}

// CTAs are (row, CTA of the row, key head).  What they keep is parts_rhp, [rows, HEADS, most_parts] of
// kKeptFloats; arrived_rk counts the CTAs that are done, and is 0 before and after.
extern "C" __global__ void __launch_bounds__(kPartThreads, 2)
    attend_parts(const INNER* qkv_t, const INNER* keys, const INNER* values,
                 const int* positions_t, const int* cu_seqlens_s, const int* pages_sw,
                 float* parts_rhp, u32* arrived_rk, INNER* out, int extent, int sequences,
                 int width, int page_tokens, int most_parts, float scale) {
  Shared& mine = *reinterpret_cast<Shared*>(shared);
  wait_for_previous();
  let_next_start();
  int row = blockIdx.x, ctas = gridDim.y, kv_head = blockIdx.z, warp = threadIdx.x / kWarp;
  int context = positions_t[row] + 1, count = (context + kPartKeys - 1) / kPartKeys;
  if (blockIdx.y >= count) return;
  load_queries(mine.queries, qkv_t, row, kv_head, kGroup);
  __syncthreads();
  int sequence = sequence_of(row, cu_seqlens_s, sequences), contexts[kGroup];
#pragma unroll
  for (int p = 0; p < kGroup; ++p) contexts[p] = context;
  Pages pages{pages_sw + size_t(sequence) * width, page_tokens};
  Past past{keys + kv_head * HEAD_DIM, values + kv_head * HEAD_DIM, kKeys};
  Tiles<kWarp, PART_STAGES> tiles(mine.stages[warp], past, pages);
  using Group = Pairs<kGroup>;
  Group pairs{mine.queries, 0, 1, kGroup - 1,
              reinterpret_cast<Group::Weights*>(mine.weights[warp])};
  Heads heads{out, row, kv_head * kGroup * HEAD_DIM, extent};
  float* kept = parts_rhp + size_t(row * HEADS + kv_head * kGroup) * most_parts * kKeptFloats;
  for (int part = blockIdx.y + warp * ctas; part < count; part += PART_WARPS * ctas) {
    int begin = part * kPartKeys, end = min(begin + kPartKeys, context);
    Sums<kGroup> sums = sum_part(tiles, pairs, begin, end, contexts, scale);
#pragma unroll
    for (int p = 0; p < kGroup; ++p)
      if (count == 1) heads.store(p, sums.of[p], sums.total[p]);
      else keep_part(kept + (size_t(p) * most_parts + part) * kKeptFloats, sums, p);
  }
  if (count == 1) return;
  u32* arrived = arrived_rk + row * KV_HEADS + kv_head;
  __syncthreads();
  if (threadIdx.x == 0) {
    mine.is_last = arrive(arrived) + 1 == min(count, ctas);
    if (mine.is_last) *arrived = 0;
  }
  __syncthreads();
  if (!mine.is_last) return;
  for (int p = warp; p < kGroup; p += PART_WARPS)
    add_kept(kept + size_t(p) * most_parts * kKeptFloats, count, p, heads);
}
