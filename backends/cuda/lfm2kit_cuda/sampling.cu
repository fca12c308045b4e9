// Draws a token of each row of logits, as lfm2kit.engine.drawing does (sampling.py, decision 0035): the
// same one, because the weights of a draw are whole numbers.  A CTA per row that asks.  r rows, v vocab_size.
//
// Nothing is sorted.  Scores are compared by ranks, whole numbers in the same order, and the score at
// which top-k or top-p cut is found digit by digit: each digit's sums are counted, and the digit is
// the one in which a sum passes its bound.  What is added is whole, so threads may add in any order.
//
// Errors are -1, if a logit is NaN or above kLargest, and -2, if nothing that is allowed has a logit
// above -kLargest.
#include "dependent.cuh"
#include "types.cuh"

typedef long long i64;

constexpr int kThreads = THREADS, kWarps = kThreads / 32;
constexpr int kBits = BITS, kBins = 1 << kBits, kDigits = 32 / kBits;  // of a digit
static_assert(kBins <= kThreads && 32 % kBits == 0, "a thread has a bin of the sums");
constexpr float kLargest = LARGEST;
constexpr double kWhole = 1099511627776.0;         // 2^40, the weight of the best token
constexpr double kShare = 4611686018427387904.0;   // 2^62, of a probability of 1
constexpr double kLeast = -29.0;                   // the weight of a score that much below the best is 0
constexpr u32 kAll = 0xffffffffu;

// What a row asks, as lfm2kit.engine.asked writes it.
struct Asked {
  double temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty;
  i64 top_k, prompt, generated, forbidden, biases, words, is_masked;
  u64 seed, position;
  i64 row, first_id, first_bias, first_word;
};

__shared__ u64 histogram[kWarps][kBins];
__shared__ u64 values[kThreads];

// Returns what `op` makes of all threads' values, in an order that is always the same.
template <class T, class Op>
__device__ inline T of_all(T mine, Op op) {
  static_assert(sizeof(T) == sizeof(u64));
  T* shared = reinterpret_cast<T*>(values);
  __syncthreads();  // the last result has been read
  shared[threadIdx.x] = mine;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half) shared[threadIdx.x] = op(shared[threadIdx.x], shared[threadIdx.x + half]);
  }
  __syncthreads();
  return shared[0];
}

__device__ inline u64 sum_of_all(u64 mine) {
  return of_all(mine, [](u64 a, u64 b) { return a + b; });
}
__device__ inline u64 most_of_all(u64 mine) {
  return of_all(mine, [](u64 a, u64 b) { return a > b ? a : b; });
}
__device__ inline u64 least_of_all(u64 mine) { return ~most_of_all(~mine); }

// Returns the sum of the values of this thread and of those before it.
__device__ inline u64 sum_up_to(u64 mine) {
  __syncthreads();  // the last result has been read
  values[threadIdx.x] = mine;
  for (int step = 1; step < kThreads; step *= 2) {
    __syncthreads();
    u64 before = int(threadIdx.x) >= step ? values[threadIdx.x - step] : 0;
    __syncthreads();
    values[threadIdx.x] += before;
  }
  __syncthreads();
  return values[threadIdx.x];
}

// Returns a number that is larger for a larger float; 0 and -0 have the same.
__device__ inline u32 rank_of(float x) {
  u32 bits = __float_as_uint(__fadd_rn(x, 0.0f));
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The scores of a row, without those that are excluded.
struct Scores {
  const float* logits;
  int vocab;
  float temperature, best;  // best is a score

  __device__ bool has(int i) const { return logits[i] >= -kLargest; }
  __device__ float of(int i) const { return __fdiv_rn(logits[i], temperature); }
  __device__ double below_best(int i) const { return double(of(i)) - double(best); }
  __device__ double weight(int i) const {
    double below = below_best(i);
    return below < kLeast ? 0.0 : exp(below);
  }
};

// Which scores are kept: those from `border` on, and of those that equal it the first `equal` ones.
struct Kept {
  u32 border;
  u64 equal;
  double least;  // weight, of min-p

  __device__ bool all_equal() const { return equal == ~0ull; }
};

// Where the sums of what scores count for, in ascending order, pass a bound.
struct Border {
  u32 rank;
  u64 below;  // the sum of all lower scores
};

// `passes` says of a sum, which grows, whether it is beyond the bound.  If none is, the border is the
// largest score.  Only scores of at least `from` are looked at.
template <class Count, class Passes>
__device__ Border border_of(const Scores& scores, u32 from, Count count, Passes passes) {
  Border border{0, 0};
  int warp = threadIdx.x / 32;
  for (int digit = kDigits - 1; digit >= 0; --digit) {
    for (int i = threadIdx.x; i < kWarps * kBins; i += kThreads) histogram[i / kBins][i % kBins] = 0;
    __syncthreads();
    int shift = kBits * digit;
    for (int i = threadIdx.x; i < scores.vocab; i += kThreads) {
      if (!scores.has(i)) continue;
      u32 rank = rank_of(scores.of(i));
      if (rank < from || (digit < kDigits - 1 && rank >> (shift + kBits) != border.rank)) continue;
      atomicAdd(&histogram[warp][rank >> shift & (kBins - 1)], count(i));
    }
    __syncthreads();
    u64 mine = 0;
    if (threadIdx.x < kBins)
      for (int w = 0; w < kWarps; ++w) mine += histogram[w][threadIdx.x];
    u64 up_to = sum_up_to(mine);
    bool is_there = threadIdx.x < kBins && mine > 0;
    bool is_beyond = is_there && passes(border.below + up_to);
    u64 bin = least_of_all(is_beyond ? threadIdx.x : kBins);
    if (bin == kBins) bin = most_of_all(is_there ? threadIdx.x : 0);
    border.below += sum_of_all(threadIdx.x == bin ? up_to - mine : 0);
    border.rank = border.rank << kBits | u32(bin);
  }
  return border;
}

__device__ inline u64 equal_to(const Scores& scores, u32 rank) {
  u64 mine = 0;
  for (int i = threadIdx.x; i < scores.vocab; i += kThreads)
    mine += scores.has(i) && rank_of(scores.of(i)) == rank;
  return sum_of_all(mine);
}

// Keeps the k best, and all that equal the last of them.
__device__ inline u32 from_top_k(const Scores& scores, u64 k) {
  u64 mine = 0;
  for (int i = threadIdx.x; i < scores.vocab; i += kThreads) mine += scores.has(i);
  u64 all = sum_of_all(mine);
  if (k == 0 || k >= all) return 0;
  auto one = [](int) { return u64(1); };
  return border_of(scores, 0, one, [=](u64 sum) { return sum > all - k; }).rank;
}

// Removes the least likely whose probabilities add up to no more than 1 - top_p, of those from a rank
// on.  Probabilities and sums are rounded to float32, which decides where probabilities are equal.
__device__ inline Kept from_top_p(const Scores& scores, u32 from, double top_p) {
  double mine = 0.0;
  for (int i = threadIdx.x; i < scores.vocab; i += kThreads)
    if (scores.has(i) && rank_of(scores.of(i)) >= from) mine += exp(scores.below_best(i));
  double total = of_all(mine, [](double a, double b) { return a + b; });
  float rest = float(1.0 - top_p);
  auto share = [=](int i) { return double(float(exp(scores.below_best(i)) / total)); };
  auto passes = [=](double sum) { return float(sum) > rest; };
  Border border = border_of(
      scores, from, [=](int i) { return u64(rint(share(i) * kShare)); },
      [=](u64 sum) { return passes(double(sum) / kShare); });
  u64 equal = equal_to(scores, border.rank);
  __shared__ u64 removed;
  __syncthreads();
  for (int i = threadIdx.x; i < scores.vocab; i += kThreads) {
    if (!scores.has(i) || rank_of(scores.of(i)) != border.rank) continue;
    double each = share(i), below = double(border.below) / kShare;
    u64 count = 0;  // all that equal the border find the same
    while (count + 1 < equal && !passes(below + double(count + 1) * each)) ++count;
    removed = count;
  }
  __syncthreads();
  return {border.rank, removed ? equal - removed : ~0ull, 0.0};
}

// Returns the upper 64 bits of a product.
__device__ inline u64 high(u64 a, u64 b) {
  u64 low = (a & kAll) * (b & kAll) >> 32, middle = (a >> 32) * (b & kAll) + low;
  u64 other = (a & kAll) * (b >> 32) + (middle & kAll);
  return (a >> 32) * (b >> 32) + (middle >> 32) + (other >> 32);
}

// Returns 64 random bits for a position: Philox4x32-10, as in lfm2kit.engine.random_numbers.
__device__ inline u64 bits_of_draw(u64 seed, u64 position) {
  u32 a = u32(position), b = 0, c = 0, d = 0, left = u32(seed), right = u32(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    u64 first = 0xd2511f53ull * a, second = 0xcd9e8d57ull * c;
    a = u32(second >> 32) ^ b ^ left, b = u32(second);
    c = u32(first >> 32) ^ d ^ right, d = u32(first);
    left += 0x9e3779b9u, right += 0xbb67ae85u;
  }
  return u64(b) << 32 | a;
}

// Calls until(i, weight) for the kept tokens of [begin, end), until it returns true.  `equal` tokens
// before `begin` equal the border.
//
// A function, because NVRTC 13.0 takes the generic lambda that it could be for a host function.
template <class Until>
__device__ inline void look_through(const Scores& scores, const Kept& kept, int begin, int end, u64 equal,
                                    Until until) {
  for (int i = begin; i < end; ++i) {
    if (!scores.has(i)) continue;
    u32 rank = rank_of(scores.of(i));
    if (rank < kept.border || (rank == kept.border && equal++ >= kept.equal)) continue;
    double weight = scores.weight(i);
    if (weight >= kept.least && until(i, u64(rint(weight * kWhole)))) return;
  }
}

// Returns the id at which the cumulative whole weight, in the order of ids, passes a random one.  Each
// thread has ids that follow each other.
__device__ inline int drawn(const Scores& scores, const Kept& kept, u64 bits) {
  int chunk = (scores.vocab + kThreads - 1) / kThreads;
  int begin = min(int(threadIdx.x) * chunk, scores.vocab), end = min(begin + chunk, scores.vocab);
  u64 equal = 0;
  if (!kept.all_equal()) {
    u64 mine = 0;
    for (int i = begin; i < end; ++i) mine += scores.has(i) && rank_of(scores.of(i)) == kept.border;
    equal = sum_up_to(mine) - mine;
  }
  u64 mine = 0;
  look_through(scores, kept, begin, end, equal, [&](int, u64 weight) {
    mine += weight;
    return false;
  });
  u64 up_to = sum_up_to(mine), total = values[kThreads - 1];
  u64 passed = high(bits, total), sum = up_to - mine, found = ~0ull;
  if (sum <= passed && passed < up_to)
    look_through(scores, kept, begin, end, equal, [&](int i, u64 weight) {
      sum += weight;
      if (sum > passed) found = u64(i);
      return sum > passed;
    });
  return int(least_of_all(found));
}

// Changes the logits of tokens that a sequence holds already, or that have a bias.
__device__ inline void penalise(const float* logits, float* changed, int* counts, const Asked& row,
                                const int* ids, const float* biases) {
  int seen = int(row.prompt + row.generated);
  float repetition = float(row.repetition_penalty), presence = float(row.presence_penalty);
  float frequency = float(row.frequency_penalty);
  if (repetition != 1.0f)
    for (int n = threadIdx.x; n < seen; n += kThreads) {
      float logit = logits[ids[n]];
      changed[ids[n]] = logit < 0.0f ? __fmul_rn(logit, repetition) : __fdiv_rn(logit, repetition);
    }
  __syncthreads();
  if (presence != 0.0f || frequency != 0.0f) {
    for (int n = int(row.prompt) + threadIdx.x; n < seen; n += kThreads) atomicAdd(counts + ids[n], 1);
    __syncthreads();
    for (int n = int(row.prompt) + threadIdx.x; n < seen; n += kThreads)
      if (int count = atomicExch(counts + ids[n], 0)) {  // one of the threads that have this id
        float change = __fadd_rn(__fmul_rn(frequency, float(count)), presence);
        changed[ids[n]] = __fadd_rn(changed[ids[n]], -change);
      }
    __syncthreads();
  }
  const int* with_bias = ids + seen + row.forbidden;
  for (int n = threadIdx.x; n < row.biases; n += kThreads)
    changed[with_bias[n]] = __fadd_rn(changed[with_bias[n]], biases[n]);
  __syncthreads();
}

__device__ inline void exclude(float* changed, int vocab, const Asked& row, const int* ids,
                               const u32* words) {
  float nothing = -__uint_as_float(0x7f800000u);
  if (row.is_masked)
    for (int i = threadIdx.x; i < vocab; i += kThreads) {
      u32 word = i / 32 < row.words ? words[i / 32] : 0;
      if (!(word >> i % 32 & 1)) changed[i] = nothing;
    }
  const int* forbidden = ids + row.prompt + row.generated;
  for (int n = threadIdx.x; n < row.forbidden; n += kThreads) changed[forbidden[n]] = nothing;
  __syncthreads();
}

//   ids, biases, words  of all rows; see Asked
//   newest_r            null, or the ids that take the place of the last generated ones
//   changed_rv, counts_rv  to work in; all counts are 0 before and after
//   token_r             the ids that are drawn, or errors; nothing for a row that asks nothing
//   id_r                the same, but id 0 in place of errors
extern "C" __global__ void __launch_bounds__(kThreads)
    draw_tokens(const float* logits_rv, int vocab, const Asked* asked_r, int* ids, const float* biases,
                const u32* words, const int* newest_r, float* changed_rv, int* counts_rv, int* token_r,
                int* id_r) {
  wait_for_previous();
  let_next_start();
  Asked row = asked_r[blockIdx.x];
  size_t first = size_t(row.row) * vocab;
  const float* logits = logits_rv + first;
  float* changed = changed_rv + first;
  ids += row.first_id, biases += row.first_bias, words += row.first_word;
  if (newest_r && row.generated && threadIdx.x == 0)  // others read it behind a barrier
    ids[row.prompt + row.generated - 1] = newest_r[row.row];
  u64 is_bad = 0;
  for (int i = threadIdx.x; i < vocab; i += kThreads) {
    float logit = logits[i];
    changed[i] = logit;
    is_bad |= !(logit <= kLargest);
  }
  if (most_of_all(is_bad)) {
    if (threadIdx.x == 0) token_r[row.row] = -1, id_r[row.row] = 0;
    return;
  }
  penalise(logits, changed, counts_rv + first, row, ids, biases);
  exclude(changed, vocab, row, ids, words);
  Scores scores{changed, vocab, float(row.temperature), 0.0f};
  u64 best_rank = 0;
  for (int i = threadIdx.x; i < vocab; i += kThreads)
    if (scores.has(i)) best_rank = max(best_rank, u64(rank_of(changed[i])) + 1);
  best_rank = most_of_all(best_rank);
  u64 best_id = ~0ull;  // of those that have it, the lowest
  for (int i = threadIdx.x; i < vocab; i += kThreads)
    if (scores.has(i) && u64(rank_of(changed[i])) + 1 == best_rank) best_id = min(best_id, u64(i));
  best_id = least_of_all(best_id);
  int token = best_rank == 0 ? -2 : int(best_id);
  if (best_rank > 0 && row.temperature != 0.0) {
    scores.best = scores.of(token);
    Kept kept{from_top_k(scores, u64(row.top_k)), ~0ull, 0.0};
    if (row.top_p < 1.0) kept = from_top_p(scores, kept.border, row.top_p);
    kept.least = row.min_p;
    token = drawn(scores, kept, bits_of_draw(row.seed, row.position));
  }
  if (threadIdx.x == 0) token_r[row.row] = token, id_r[row.row] = max(token, 0);
}
