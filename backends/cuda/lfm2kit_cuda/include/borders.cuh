// What top-k and top-p keep of a row.  Nothing is sorted: the score at which they cut is found digit by
// digit of its rank.  Each digit's sums are counted, and the digit is the one in which a sum passes its
// bound.  What is added is whole, so threads may add in any order.
#pragma once
#include "scores.cuh"

constexpr double kShare = 4611686018427387904.0;  // 2^62, of a probability of 1
constexpr u64 kAllEqual = ~0ull;

// Which scores are kept: those above `border`, and of those that equal it the first `equal` ones.
struct Kept {
  u32 border;
  u64 equal, before;  // how many in the parts before this one equal the border
};

// Adds to a sum in shared memory, as two words: an addition of 64 bits would be a loop.
__device__ inline void add(u64* sum, u64 more) {
  u32* words = reinterpret_cast<u32*>(sum);
  u32 low = u32(more), high = u32(more >> 32);
  high += atomicAdd(words, low) + low < low;  // carried
  if (high) atomicAdd(words + 1, high);
}
__device__ inline void add(u64* sum, u32 more) { atomicAdd(reinterpret_cast<u32*>(sum), more); }

// Moves the border to the bin in which the sum of bins, in ascending order, gets beyond a bound.
template <class IsBeyond>
__device__ inline void narrow(Border* border, Cta* cta, u64 own, u64 sum, IsBeyond is_beyond) {
  if (is_beyond(sum) && !is_beyond(sum - own)) cta->found = {u32(threadIdx.x), sum - own, own};
  __syncthreads();
  border->rank = border->rank << kBits | cta->found.rank;
  border->below += cta->found.below, border->own = cta->found.own;
}

// Returns the sum of this thread's bin over all CTAs.  `turn` counts digits, of which two take turns.
__device__ inline u64 sum_of_bin(Cta* cta, int turn) {
  u64(*sums)[kBins] = cta->sums[turn % 2];
  u64 *own = &sums[cta_of_cluster()][threadIdx.x], *barrier = &cta->barriers[kTold + turn], sum = 0;
  bool has_bin = threadIdx.x < kBins;
  __syncthreads();  // all that this CTA adds is in its bins
  if (has_bin)
#pragma unroll 1
    for (int other = 0; other < kCtas; ++other) send(other, own, *own, barrier);
  wait_for_sent(barrier);
  if (!has_bin) return 0;
  for (int other = 0; other < kCtas; ++other) sum += sums[other][threadIdx.x];
  *own = 0;  // for the next digit but one
  return sum;
}

// `passes` says of a sum, which grows, whether it is beyond the bound, given the sum of all; 0 is not.
// If none is, the border is the largest score.  Only scores of at least `from` are looked at.
template <class Count, class Passes>
__device__ Border border_of(const Row& row, int filter, u32 from, Count count, Passes passes) {
  Border border{0, 0, 0};
  u64 all = 0;
#pragma unroll 1
  for (int digit = kDigits - 1; digit >= 0; --digit) {
    int shift = kBits * digit;
    int turn = filter * kDigits + digit;
    u64* sums = row.cta->sums[turn % 2][cta_of_cluster()];
    row.each_score([&](float score) {
      u32 rank = rank_of(score), digits = rank >> shift;
      if (rank >= from && digits >> kBits == border.rank) add(&sums[digits & (kBins - 1)], count(score));
    });
    u64 own = sum_of_bin(row.cta, turn), total;
    u64 up_to = sum_up_to_thread(row.cta, own, &total);
    if (digit == kDigits - 1) all = total;
    narrow(&border, row.cta, own, up_to, [&](u64 sum) {
      return sum == total || passes(border.below + sum, all);
    });
  }
  return border;
}

// Returns the lowest rank of the k best, and of all that equal the last of them.
__device__ inline u32 from_top_k(const Row& row, u64 k) {
  auto one = [](float) { return u32(1); };
  auto passes = [=](u64 sum, u64 all) { return sum > all - min(k, all); };
  return border_of(row, kTopK, kLowestRank, one, passes).rank;
}

// Keeps what is above the border, and of what equals it the lowest ids.
__device__ inline Kept first_equal(const Row& row, u32 border, u64 kept) {
  u64 own = 0;
  row.each_score([&](float score) { own += rank_of(score) == border; });
  return {border, kept, sums_of_all(row.cta, kEqual, row.part, own).before};
}

// Removes the least likely whose probabilities add up to no more than 1 - top_p, of those from a rank
// on.  Probabilities and sums are rounded to float32, which decides where probabilities are equal.
__device__ inline Kept from_top_p(const Row& row, u32 from, double top_p) {
  double mine = 0.0;
  row.each_score([&](float score) {
    if (rank_of(score) >= from) mine += exp(row.below_best(score));
  });
  double total = sums_of_all(row.cta, kTotal, row.part, mine).all;
  float rest = float(1.0 - top_p);
  auto share = [=](float score) { return double(float(exp(row.below_best(score)) / total)); };
  auto whole = [=](float score) { return u64(rint(share(score) * kShare)); };
  auto passes = [=](double sum) { return float(sum) > rest; };
  Border border = border_of(row, kTopP, from, whole,
                            [=](u64 sum, u64) { return passes(double(sum) / kShare); });
  float score = score_of(border.rank);
  double below = double(border.below) / kShare, each = share(score);
  u64 equal = border.own / whole(score), removed = 0, too_many = equal;
  while (too_many - removed > 1) {
    u64 count = removed + (too_many - removed) / 2;
    (passes(below + double(count) * each) ? too_many : removed) = count;
  }
  return removed ? first_equal(row, border.rank, equal - removed) : Kept{border.rank, kAllEqual};
}
