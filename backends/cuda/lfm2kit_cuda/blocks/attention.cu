// Between the projections of attention, last: the heads of each row, of normed and rotated queries and
// keys (heads.cuh, rotation.cu), in two ways that have the same bits (attention_sums.cuh).
// t tokens, s sequences.  Queries, keys and values are of type INNER, and the result as the next
// product reads it.  Kept keys and values are [pages, page_tokens, KV_HEADS, HEAD_DIM]; pages_sw
// names the pages of each sequence, `width` numbers in a row.
#include "dependent.cuh"
#include "heads.cuh"
#include "kept_parts.cuh"
#include "layers.cuh"
#include "ordering.cuh"
#include "sequences.cuh"
#include "slabs.cuh"
#include "team_sums.cuh"
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

  // Stores zeros for a padding row, with a CTA.
  __device__ void clear() const {
    const float zeros[kDims] = {};
    for (int pair = threadIdx.x / kWarp; pair < kGroup; pair += kWarps) store(pair, zeros, 1);
  }
};

// One way: a CTA takes up to kRows rows of a sequence with the query heads of one key head, and goes
// through all keys itself; its warps share the tiles and the (row, head) pairs.
constexpr int kRows = kGroup >= MOST_ROWS ? 1 : MOST_ROWS / kGroup;
constexpr int kPairs = kRows * kGroup;
constexpr int kPairsOfWarp = (kPairs + kWarps - 1) / kWarps;

struct Whole {
  Tile stages[2];
  float queries[kPairs][HEAD_DIM];
  alignas(16) float weights[kWarps][kPairsOfWarp][kTile];
};
static_assert(sizeof(Whole) <= WHOLE_BYTES, "what a launch asks for");

// Computes and stores the attention of `pairs` pairs, kMine per warp; positions_r[pair / kGroup] is the
// position of a pair's row.
template <int kMine>
__device__ inline void attend_pairs(Whole& whole, Tiles tiles, const int* positions_r, int pairs,
                                    const Heads& heads, float scale) {
  int warp = threadIdx.x / kWarp, context[kMine];  // keys that a pair sees
  Pairs<kMine> mine{whole.queries, warp, kWarps, kPairs - 1, {whole.weights[warp][0], kTile}};
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
  Heads heads{out, row0, kv_head * kGroup * HEAD_DIM, extent};
  const int* positions_r = positions_t + row0;
  if (positions_r[0] < 0) return heads.clear();
  int pairs = min(kRows, end - row0) * kGroup;
  load_queries(whole.queries, qkv_t, row0, kv_head, pairs);
  Pages pages{keys ? pages_sw + size_t(sequence) * width : nullptr, page_tokens};
  Tiles tiles(whole.stages, past_of(qkv_t, keys, values, first, kv_head), pages);
  if (pairs <= kWarps) attend_pairs<1>(whole, tiles, positions_r, pairs, heads, scale);
  else attend_pairs<kPairsOfWarp>(whole, tiles, positions_r, pairs, heads, scale);
}

// The other way, for few rows with many keys: CTAs share a row's parts.  The warps of a CTA sum one
// part after the other together (team_sums.cuh), and the CTA that is done last adds the parts.
struct Shared {
  Tile span[kSpanTiles];
  Team team;
  int is_last;
};
static_assert(sizeof(Shared) <= PARTS_BYTES, "what a launch asks for");

// Where the spans of a CTA are that takes every ctas-th part.
struct Course {
  int first, ctas;

  // The first key of span i.  From the first one beyond the context on, there are none.
  __device__ int key0(int i) const {
    constexpr int kSpans = kPartKeys / kSpanKeys;  // of a part
    return (first + i / kSpans * ctas) * kPartKeys + i % kSpans * kSpanKeys;
  }
};

// Sums the parts of a CTA one after the other, and calls keep(part, sums) with each.
template <class Keep>
__device__ inline void sum_parts(Shared& mine, Spans<kSpanTiles>& spans, const Course& course,
                                 int context, float scale, Keep keep) {
  TeamSums sums;
  for (int i = 1, key0 = course.key0(0), next; key0 < context; ++i, key0 = next) {
    int keys = min(kSpanKeys, context - key0);
    if (key0 % kPartKeys == 0) sums = nothing<kHeadsOfWarp>();
    spans.wait();
    spans.copy_values();
    next = course.key0(i);
    spans.seek(next, context);
    score_span(mine.team, mine.span, keys);
    spans.wait();
    if (next < context) spans.copy_keys();
    add_span(mine.team, mine.span, sums, keys, scale);
    if (next >= context || next / kPartKeys != key0 / kPartKeys) keep(key0 / kPartKeys, sums);
  }
}

// Whether this CTA is the last one of `ctas` that come here; `arrived` is 0 before and after.
__device__ inline bool is_last(Shared& mine, u32* arrived, u32 ctas) {
  __syncthreads();
  if (threadIdx.x == 0) {
    mine.is_last = arrive(arrived) + 1 == ctas;
    if (mine.is_last) *arrived = 0;
  }
  __syncthreads();
  return mine.is_last;
}

// CTAs are (row, CTA of the row, key head).  What they keep is parts_rhp, [rows, HEADS, most_parts];
// arrived_rk counts the CTAs that are done.
extern "C" __global__ void __launch_bounds__(kThreads, CTAS_OF_SM)
    attend_parts(const INNER* qkv_t, const INNER* keys, const INNER* values,
                 const int* positions_t, const int* cu_seqlens_s, const int* pages_sw,
                 Kept* parts_rhp, u32* arrived_rk, INNER* out, int extent, int sequences,
                 int width, int page_tokens, int most_parts, float scale) {
  Shared& mine = *reinterpret_cast<Shared*>(shared);
  wait_for_previous();
  let_next_start();
  int row = blockIdx.x, kv_head = blockIdx.z;
  int context = positions_t[row] + 1, sequence = sequence_of(row, cu_seqlens_s, sequences);
  int count = (context + kPartKeys - 1) / kPartKeys;
  Heads heads{out, row, kv_head * kGroup * HEAD_DIM, extent};
  if (context == 0 && blockIdx.y == 0) heads.clear();
  if (blockIdx.y >= count) return;
  Past past{keys + kv_head * HEAD_DIM, values + kv_head * HEAD_DIM, kKeys};
  Spans<kSpanTiles> spans(mine.span, past, {pages_sw + size_t(sequence) * width, page_tokens});
  Course course{int(blockIdx.y), int(gridDim.y)};
  spans.seek(course.key0(0), context);
  spans.copy_keys();
  load_queries(mine.team.queries, qkv_t, row, kv_head, kGroup);
  Kept* kept_hp = parts_rhp + size_t(row * HEADS + kv_head * kGroup) * most_parts;
  sum_parts(mine, spans, course, context, scale, [&](int part, const TeamSums& sums) {
#pragma unroll
    for (int p = 0; p < kHeadsOfWarp; ++p) {
      int head = head_of_warp(p);
      if (head >= kGroup) continue;
      if (count == 1) heads.store(head, sums.of[p], sums.total[p]);
      else keep_part(kept_hp[size_t(head) * most_parts + part], sums, p);
    }
  });
  if (count == 1) return;
  if (!is_last(mine, arrived_rk + row * KV_HEADS + kv_head, min(count, course.ctas))) return;
  for (int head = head_of_warp(0); head < kGroup; head += kWarps) {
    Sums<1> sums = add_kept(kept_hp + size_t(head) * most_parts, count);
    heads.store(head, sums.of[0], sums.total[0]);
  }
}
