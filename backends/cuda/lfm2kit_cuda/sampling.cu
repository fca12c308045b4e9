// Draws a token of each row of logits, as lfm2kit.engine.drawing does (sampling.py, decision 0035): the
// same one, because the weights of a draw are whole numbers.  A cluster per row that asks.  r rows,
// v vocab_size.
//
// Errors are -1, if a logit is NaN or above kLargest, and -2, if nothing that is allowed has a logit
// above -kLargest.
#include "borders.cuh"
#include "dependent.cuh"
#include "random_bits.cuh"

typedef long long i64;

constexpr float kLargest = LARGEST;
constexpr double kWhole = 1099511627776.0;  // 2^40, the weight of the best token
constexpr double kLeast = -29.0;            // the weight of a score that much below the best is 0
constexpr double kMargin = 1e-9;            // more than a logarithm's rounding
constexpr u64 kBad = ~0ull;                 // above all that is best
constexpr int kNone = -3;                   // neither an id nor an error

// What a row asks, as lfm2kit.engine.asked writes it.
struct Asked {
  double temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty;
  i64 top_k, prompt, generated, forbidden, biases, words, is_masked;
  u64 seed, position;
  i64 row, first_id, first_bias, first_word;
};
constexpr int kAskedWords = sizeof(Asked) / sizeof(u64);
static_assert(kAskedWords <= kThreads, "a thread copies a word of what a row asks");

// The whole weights of a warp's scores: `of` is called by all lanes at once, in the order of ids.
struct Weights {
  const Row& row;
  Kept kept;
  double min_p;
  u32 from;  // ranks below it have no weight; rounding moves a score by half a rank

  __device__ Weights(const Row& row, const Kept& kept, double min_p)
      : row(row), kept(kept), min_p(min_p) {
    double below = min_p > 0.0 ? max(kLeast, log(min_p)) : kLeast;
    from = max(kept.border, rank_of(float(row.best + below - kMargin)) - 1);
  }
  __device__ u64 of(float score) {
    u32 rank = rank_of(score);
    if (is_cut(rank == kept.border) || rank < from) return 0;
    double weight = exp(row.below_best(score));
    return weight < min_p ? 0 : u64(rint(weight * kWhole));
  }
  // Whether a score equals the border, and those with lower ids are enough.
  __device__ bool is_cut(bool is_equal) {
    if (kept.equal == kAllEqual) return false;
    u32 equal = __ballot_sync(~0u, is_equal), before = equal & ((1u << lane()) - 1);
    bool are_enough = kept.before + __popc(before) >= kept.equal;
    kept.before += __popc(equal);
    return is_equal && are_enough;
  }
};

// Returns the id at which the cumulative weight gets beyond `passed`, in the thread that has it, and
// kNone in all others.  This warp has the id; the weights of the warps before add up to `sum`.
__device__ inline int passing(const Row& row, Weights weights, u64 sum, u64 passed) {
  int found = kNone;
  for (int run = row.of_warp.begin; sum <= passed; run += 32) {
    int i = run + lane();
    u64 weight = weights.of(row.at(i));
    if (!__any_sync(~0u, weight > 0)) continue;
    u64 up_to = sum + sum_up_to_lane(weight);
    if (up_to - weight <= passed && passed < up_to) found = i;
    sum = __shfl_sync(~0u, up_to, 31);
  }
  return found;
}

// Returns the id at which the cumulative weight, in the order of ids, passes a random one, or kNone.
__device__ inline int drawn(const Row& row, const Kept& kept, double min_p, u64 bits) {
  const Weights first(row, kept, min_p);
  Weights weights = first;
  u64 mine = 0;
  row.each_score([&](float score) { mine += weights.of(score); });
  Sums<u64> sums = sums_of_all(row.cta, kWeight, row.part, mine);
  u64 passed = high(bits, sums.all);
  bool is_here = sums.before <= passed && passed < sums.before + sums.own;
  return is_here ? passing(row, first, sums.before, passed) : kNone;
}

__device__ inline Kept kept_of(const Row& row, const Asked& asked) {
  bool is_cut = 0 < asked.top_k && asked.top_k < row.vocab;
  u32 from = is_cut ? from_top_k(row, u64(asked.top_k)) : kLowestRank;
  return asked.top_p < 1.0 ? from_top_p(row, from, asked.top_p) : Kept{from, kAllEqual};
}

// Returns the token of a row, or the error, in one thread of the cluster, and kNone in all others.
__device__ inline int token_of(Row& row, const Asked& asked, u64 best) {
  bool is_first = row.part == 0 && lane() == 0;
  if (best == kBad) return is_first ? -1 : kNone;
  if (best == 0) return is_first ? -2 : kNone;
  if (asked.temperature == 0.0) return is_first ? int(~u32(best)) : kNone;
  row.best = score_of(u32(best >> 32));
  return drawn(row, kept_of(row, asked), asked.min_p, bits_of_draw(asked.seed, asked.position));
}

// Changes the logits of tokens that a sequence holds already.
__device__ inline void penalise(const Row& row, const float* logits, int* counts, const Asked& asked,
                                const int* ids) {
  int prompt = int(asked.prompt), seen = prompt + int(asked.generated);
  float repetition = float(asked.repetition_penalty), presence = float(asked.presence_penalty);
  float frequency = float(asked.frequency_penalty);
  if (repetition != 1.0f)
    row.each_id(ids, 0, seen, [&](int, int id) {
      float logit = logits[id];
      row.scores[id] = logit < 0.0f ? __fmul_rn(logit, repetition) : __fdiv_rn(logit, repetition);
    });
  if (presence == 0.0f && frequency == 0.0f) return;
  row.each_id(ids, prompt, seen, [&](int, int id) { atomicAdd(counts + id, 1); });
  row.each_id(ids, prompt, seen, [&](int, int id) {
    int count = atomicExch(counts + id, 0);
    if (count == 0) return;  // another thread has this id too
    float change = __fadd_rn(__fmul_rn(frequency, float(count)), presence);
    row.scores[id] = __fadd_rn(row.scores[id], -change);
  });
}

// Changes the logits of tokens that have a bias or are forbidden, which may be the same.
__device__ inline void bias(const Row& row, const Asked& asked, const int* ids, const float* biases) {
  row.each_id(ids + asked.forbidden, 0, int(asked.biases), [&](int n, int id) {
    row.scores[id] = __fadd_rn(row.scores[id], biases[n]);
  });
  row.each_id(ids, 0, int(asked.forbidden), [&](int, int id) { row.scores[id] = Row::nothing(); });
}

// Copies the logits of this warp.  Returns whether this thread's are such that nothing can be drawn.
__device__ inline bool copied(const Row& row, const float* logits) {
  bool is_bad = false;
  each<8>(logits, row.of_warp, lane(), 32, [&](int i, float logit) {
    is_bad |= !(logit <= kLargest);
    row.scores[i] = logit;
  });
  return is_bad;
}

// Makes scores of logits.  Returns the best of this thread: its rank, and below that the complement of
// its id, so that of equal ones the lowest id is the best.  It is 0 if there is none.
__device__ inline u64 scored(const Row& row, const Asked& asked, const u32* words) {
  float temperature = asked.temperature == 0.0 ? 1.0f : float(asked.temperature);
  float best = Row::nothing();
  int best_id = 0;
  each<4>(row.scores, row.of_warp, lane(), 32, [&](int i, float logit) {
    bool is_there = logit >= -kLargest;
    if (asked.is_masked) is_there &= i / 32 < asked.words && words[i / 32] >> i % 32 & 1;
    float score = is_there ? __fdiv_rn(logit, temperature) : Row::nothing();
    row.scores[i] = score;
    if (score > best) best = score, best_id = i;
  });
  return best == Row::nothing() ? 0 : u64(rank_of(best)) << 32 | ~u32(best_id);
}

// Prepares what all CTAs of a cluster add and send to.
__device__ inline Cta* prepared() {
  Cta* cta = memory_of_cta<Cta>();
  int i = threadIdx.x, sent = i < kTold ? kParts : kCtas * kBins;
  if (i < kBarriers) expect(&cta->barriers[i], sent * int(sizeof(u64)));
  if (i < kBins) cta->sums[0][cta_of_cluster()][i] = cta->sums[1][cta_of_cluster()][i] = 0;
  synchronize_cluster();
  return cta;
}

// Returns a copy in shared memory.
__device__ inline const Asked& copy_of(const Asked* asked) {
  Asked* copy = memory_of_cta<Asked>();
  const u64* words = reinterpret_cast<const u64*>(asked);
  if (threadIdx.x < kAskedWords) reinterpret_cast<u64*>(copy)[threadIdx.x] = words[threadIdx.x];
  __syncthreads();
  return *copy;
}

//   asked_words         an Asked of each row that asks, then the ids, biases and masks of all rows, which
//                       begin at the words `first_id`, `first_bias` and `first_word`
//   newest_r            null, or the ids that take the place of the last generated ones
//   changed_rv, counts_rv  to work in; all counts are 0 before and after
//   token_r             the ids that are drawn, or errors; nothing for a row that asks nothing
//   id_r                the same, but id 0 in place of errors
extern "C" __global__ void CLUSTER_OF(kCtas) __launch_bounds__(kThreads, 2)
    draw_tokens(const float* logits_rv, int vocab, u32* asked_words, int first_id, int first_bias,
                int first_word, const int* newest_r, float* changed_rv, int* counts_rv, int* token_r,
                int* id_r) {
  Cta* cta = prepared();
  wait_for_previous();
  let_next_start();
  const Asked& asked = copy_of(reinterpret_cast<Asked*>(asked_words) + cluster_index());
  size_t first = size_t(asked.row) * vocab;
  const float* logits = logits_rv + first;
  Row row = row_of(cta, vocab, changed_rv + first);
  int* ids = reinterpret_cast<int*>(asked_words) + first_id + asked.first_id;
  const float* biases = reinterpret_cast<float*>(asked_words) + first_bias + asked.first_bias;
  if (newest_r && asked.generated && threadIdx.x == 0)  // in each CTA; others read it behind a barrier
    ids[asked.prompt + asked.generated - 1] = newest_r[asked.row];
  bool is_bad = copied(row, logits);
  __syncthreads();
  penalise(row, logits, counts_rv + first, asked, ids);
  bias(row, asked, ids + asked.prompt + asked.generated, biases);
  u64 best = scored(row, asked, asked_words + first_word + asked.first_word);
  int token = token_of(row, asked, most_of_all(cta, kBest, row.part, is_bad ? kBad : best));
  if (token != kNone) token_r[asked.row] = token, id_r[asked.row] = max(token, 0);
}
