// The choice of experts from the sums of logits (router.cu) and the grouping of its (token, k) pairs by expert
// (experts.cu) for few tokens, in a single CTA that leaves what the two kernels would.
// t tokens, e = EXPERTS, k = TAKEN, p slots, l local experts.
#include "choice.cuh"
#include "dependent.cuh"
#include "expert_tiles.cuh"

// What the warps of `choose_and_group` tell each other.
struct Grouping {
  u32 rows_e[EXPERTS];   // that have chosen an expert, a bit each
  int slot0_e[EXPERTS];  // an expert's first slot; -1 if it is not local
  int ids_l[EXPERTS];    // of the local experts
  ExpertTiles tiles_l[EXPERTS];
};
__shared__ Grouping grouping;
static_assert(MOST_TOKENS <= 32, "a row has a bit of a word");
static_assert(sizeof(ExpertTiles) / 4 % 2 == 1, "lanes that read theirs have a bank each");

// What comes before expert `l` among the `local` ones; a warp has the expert.
__device__ inline Before before_expert(int l, int local) {
  const ExpertTiles* tiles_l = grouping.tiles_l;
  Before mine = {};
  for (int other = threadIdx.x % kWarp; other < local; other += kWarp)
    mine.count(tiles_l[other], other, tiles_l[l], l);
  return {warp_sum(mine.slots), warp_sum(mine.tall), warp_sum(mine.low), warp_sum(mine.all_tiles)};
}

// Lists the tiles of all local experts, and finds their first slots; a warp has an expert.
__device__ inline void list_all_tiles(int local, int4* tiles, int* tile_count) {
  int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int l = warp; l < local; l += blockDim.x / kWarp) {
    const ExpertTiles& its = grouping.tiles_l[l];
    if (its.even.rows == 0 && l > 0) continue;  // 0 knows how many tiles there are in all
    Before before = before_expert(l, local);
    list_tiles(its, before, l, tiles, lane, kWarp);
    if (lane > 0) continue;
    grouping.slot0_e[grouping.ids_l[l]] = before.slots;
    if (l == 0) *tile_count = before.all_tiles;
  }
}

// Whether all of a row of x is zero, as padding rows are: then experts add +0 to it, whichever they are,
// so it takes none, and none is read for it.  A warp has the row; one piece says no of nearly all others.
__device__ inline bool is_zero(const float* x_th, int row, int h) {
  constexpr int kPieces = 16;
  const u32* words = reinterpret_cast<const u32*>(x_th) + size_t(row) * h;
  for (int begin = 0; begin < h; begin += kPieces * kWarp) {
    bool is_any = false;
#pragma unroll
    for (int p = 0; p < kPieces; ++p)
      if (int i = begin + p * kWarp + threadIdx.x % kWarp; i < h)
        is_any |= early(words + i) << 1 != 0;  // without the sign
    if (__any_sync(~0u, is_any)) return false;
  }
  return true;
}

// Stores the places of a row's pairs, and where they come from.
__device__ inline void place_row(int row, const Chosen& chosen, int* source_p, int* place_tk) {
#pragma unroll
  for (int k = 0; k < TAKEN; ++k) {
    int id = chosen.ids[k], slot0 = id < 0 ? -1 : grouping.slot0_e[id];
    int place = slot0 < 0 ? -1 : slot0 + __popc(grouping.rows_e[id] & ((1u << row) - 1));
    place_tk[row * TAKEN + k] = place;
    if (place >= 0) source_p[place] = row;
  }
}

// Arguments are x, those of `choose_by_sums`, and from experts_l on those of `group_by_expert`, where
// `local` is the number of its CTAs.  Rows of zeros have the ids -1.  A warp has a row.
extern "C" __global__ void __launch_bounds__(MOST_TOKENS* kWarp)
    choose_and_group(const float* x_th, int h, const float* sums_ste, const float* bias_e,
                     int* expert_ids_tk, float* expert_weights_tk, int tokens, int normalise,
                     float scaling, const int* experts_l, int local, int* source_p, int slots,
                     int* place_tk, int4* tiles, int* tile_count, int tile_rows, int step,
                     int by_height) {
  auto& [rows_e, slot0_e, ids_l, tiles_l] = grouping;
  int row = threadIdx.x / kWarp;
  bool is_first = threadIdx.x % kWarp == 0;
  for (int e = threadIdx.x; e < EXPERTS; e += blockDim.x) {
    rows_e[e] = 0, slot0_e[e] = -1;
    if (e < local) ids_l[e] = experts_l[e];
  }
  bool is_nobodys = row < tokens && is_zero(x_th, row, h);
  __syncthreads();
  wait_for_previous();
  let_next_start();
  for (int i = threadIdx.x; i < slots; i += blockDim.x) source_p[i] = -1;
  Chosen chosen;
  if (row < tokens) {
    chosen = choose_of_row(row, bias_e, normalise, scaling, [=](int row, int expert) {
      return score_of(sums_ste, tokens, row, expert);
    });
    for (int k = 0; is_nobodys && k < TAKEN; ++k) chosen.ids[k] = -1;
    if (is_first) chosen.store(row, expert_ids_tk, expert_weights_tk);
#pragma unroll
    for (int k = 0; is_first && !is_nobodys && k < TAKEN; ++k)
      atomicOr(&rows_e[chosen.ids[k]], 1u << row);
  }
  __syncthreads();
  for (int l = threadIdx.x; l < local; l += blockDim.x)
    tiles_l[l] = ExpertTiles(__popc(rows_e[ids_l[l]]), tile_rows, step, by_height);
  __syncthreads();
  list_all_tiles(local, tiles, tile_count);
  __syncthreads();
  if (row < tokens && is_first) place_row(row, chosen, source_p, place_tk);
}
