// Around the grouped products of the experts: grouping (token, k) pairs by expert, and the
// weighted sum over k.  t tokens, h hidden_size, p pairs = tokens * TAKEN, l local experts.
#include "dependent.cuh"
#include "expert_tiles.cuh"
#include "types.cuh"
#include "vector.cuh"

constexpr int kWarp = 32, kThreads = GROUP_THREADS, kWarps = kThreads / kWarp;
constexpr int kIds = 4;        // that a lane asks for at once
constexpr int kNoPair = -2;  // in the place of an expert's id; -1 is in no block's experts
constexpr int kForeign = -(1 << 30);  // more negative than any count is large

// Of every id; negative where the expert is not local.  Behind them, the ids of the local experts.
extern __shared__ int counts_e[];

struct Grouping {  // shared by the threads of `group_by_expert`
  int before_w[kWarps];
  Before before;
};
__shared__ Grouping grouping;

// The ids of pairs p0 + lane, p0 + lane + 32, ...; kNoPair from `end` on.
__device__ inline void read_ids(const int* expert_ids_p, int p0, int end, int (&ids)[kIds]) {
  int pair = p0 + threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < kIds; ++i)
    ids[i] = pair + i * kWarp < end ? expert_ids_p[pair + i * kWarp] : kNoPair;
}

// Sorts the pairs by expert, in order within each, and lists the tiles of rows.  There is a CTA
// for each local expert, and it counts all pairs.
//   experts_l       the ids of the local experts, all below `experts`; all else is by local number
//   source_p[slot]  the token whose row a slot holds; -1 for none, of `slots`
//   place_p[pair]   the slot of a pair; -1 if its expert is not local
//   tiles           as list_tiles lists them, in the order of Before; *tile_count of them
extern "C" __global__ void __launch_bounds__(kThreads)
    group_by_expert(const int* expert_ids_p, int pairs, const int* experts_l, int experts,
                    int* source_p, int slots, int* place_p, int4* tiles, int* tile_count,
                    int tile_rows, int step, int by_height) {
  auto& [before_w, before] = grouping;
  int* ids_l = counts_e + experts;
  int expert = blockIdx.x, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int e = threadIdx.x; e < experts; e += kThreads) counts_e[e] = kForeign;
  if (threadIdx.x == 0) before = {};
  __syncthreads();
  for (int e = threadIdx.x; e < gridDim.x; e += kThreads) counts_e[ids_l[e] = experts_l[e]] = 0;
  __syncthreads();
  int its_id = ids_l[expert];

  // Each warp looks through a range of the pairs: how many are of which expert?
  int range = (pairs + kWarps - 1) / kWarps, begin = min(warp * range, pairs);
  int end = min(begin + range, pairs), mine = 0;
  wait_for_previous();
  let_next_start();
  for (int p0 = begin; p0 < end; p0 += kIds * kWarp) {
    int ids[kIds];
    read_ids(expert_ids_p, p0, end, ids);
#pragma unroll
    for (int id : ids) {
      if (id >= 0) atomicAdd(&counts_e[id], 1);
      mine += __popc(__ballot_sync(~0u, id == its_id));
    }
  }
  if (lane == 0) before_w[warp] = mine;
  __syncthreads();
  ExpertTiles its(counts_e[its_id], tile_rows, step, by_height);
  for (int e = threadIdx.x; e < gridDim.x; e += kThreads) {
    Before part = {};
    part.count(ExpertTiles(counts_e[ids_l[e]], tile_rows, step, by_height), e, its, expert);
    atomicAdd(&before.slots, part.slots);
    atomicAdd(&before.tall, part.tall);
    atomicAdd(&before.low, part.low);
    atomicAdd(&before.all_tiles, part.all_tiles);
  }
  __syncthreads();

  int slot = before.slots;
  for (int w = 0; w < warp; ++w) slot += before_w[w];
  for (int p0 = begin; p0 < end; p0 += kIds * kWarp) {
    int ids[kIds];
    read_ids(expert_ids_p, p0, end, ids);
#pragma unroll
    for (int i = 0; i < kIds; ++i) {
      u32 matches = __ballot_sync(~0u, ids[i] == its_id);
      int pair = p0 + i * kWarp + lane;
      if (ids[i] == its_id) {
        int at = slot + __popc(matches & ((1u << lane) - 1));
        source_p[at] = pair / TAKEN;
        place_p[pair] = at;
      }
      if (expert == 0 && ids[i] != kNoPair && (ids[i] < 0 || counts_e[ids[i]] < 0))
        place_p[pair] = -1;
      slot += __popc(matches);
    }
  }

  int end_slot = expert == gridDim.x - 1 ? slots : before.slots + its.slots;
  for (int i = before.slots + its.even.rows + threadIdx.x; i < end_slot; i += kThreads)
    source_p[i] = -1;
  list_tiles(its, before, expert, tiles, threadIdx.x, kThreads);
  if (expert == 0 && threadIdx.x == 0) *tile_count = before.all_tiles;
}

// delta_th[t] = sum_k weights_p[t, k] * outputs_ph[place_p[t, k]]: each product rounded, added in
// the order of k from the first, so that expert parallelism, which adds elsewhere, has these bits.
// A pair whose expert is not local counts as -0, which changes no bit of a sum; without any other
// pair the sum is +0.
// A CTA per token; it asks for all that it reads before it uses the first.  Places and weights are read
// before the kernel ahead has ended, the last product: they are older.  The bound on its threads
// lets a row have any number of experts: those that the registers do not hold go to memory.
template <class Stored>
__device__ void combine(const Stored* outputs_ph, const int* place_p, const float* weights_p,
                        float* delta_th, int h) {
  size_t token = blockIdx.x;
  const Stored* from[TAKEN];
  float weight[TAKEN];
  bool is_there[TAKEN], is_any_there = false;
#pragma unroll
  for (int k = 0; k < TAKEN; ++k) {
    int place = early(place_p + token * TAKEN + k);
    is_there[k] = place >= 0;
    is_any_there |= is_there[k];
    from[k] = outputs_ph + size_t(max(place, 0)) * h;  // without a place: read and not used
    weight[k] = early(weights_p + token * TAKEN + k);
  }
  wait_for_previous();
  let_next_start();
  for (int i = threadIdx.x * VECTOR; i < h; i += blockDim.x * VECTOR) {
    Vector outputs[TAKEN], sum;
#pragma unroll
    for (int k = 0; k < TAKEN; ++k) outputs[k] = load(from[k] + i);
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) {
      sum.of[v] = is_any_there ? -0.0f : 0.0f;
#pragma unroll
      for (int k = 0; k < TAKEN; ++k) {
        float product = __fmul_rn(weight[k], outputs[k].of[v]);
        sum.of[v] = __fadd_rn(sum.of[v], is_there[k] ? product : -0.0f);
      }
    }
    store(delta_th + token * h + i, sum);
  }
}

#define COMBINE(Stored)                                                                          \
  extern "C" __global__ void __launch_bounds__(COMBINE_THREADS)                                  \
      combine_##Stored(const Stored* outputs_ph, const int* place_p, const float* weights_p,     \
                       float* delta_th, int h) {                                                 \
    combine(outputs_ph, place_p, weights_p, delta_th, h);                                        \
  }
COMBINE(F32)
COMBINE(BF16)
