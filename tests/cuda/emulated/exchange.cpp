// Exchanges tokens between ranks with the kernels of exchange.cu on the host.  A rank is a process whose
// CUDA threads take turns, and pauses now and then:
//
//     exchange RANKS MOST SLOTS K H EXPERTS CALLS CTAS THREADS DEADLINE FIRST ABSENT LATE GIVING_UP
//         ELEMENT SEED < ARRAYS
//
// CALLS calls have numbers that begin after FIRST.  From call ABSENT / RANKS on, the rank ABSENT % RANKS
// does not come, if ABSENT is not negative.  The rank LATE takes its rows late.  On the
// rank GIVING_UP % RANKS the host gives up in call GIVING_UP / RANKS, if it is not negative.  ARRAYS are, for each rank, its owners, and for each call
// and rank the number of its tokens and then x, ids and weights of MOST tokens.  The product of a row
// is its weight times x, times 1 + id / 8; rows of padding have a NaN.
//
// What comes out are the bytes of a mailbox and, for each rank, its cause and statistics, and for each call its rows, their ids
// and weights, and its sums, all poisoned before, with some elements behind them.
#include <sys/mman.h>
#include <sys/wait.h>

#include "f32.h"
#include "peers.cuh"

#include "conversions.h"
#include "halves.h"

inline u64 atomicAdd(u64* at, u64 more) { return std::atomic_ref<u64>(*at).fetch_add(more); }

#define __shared__ static  // in a function; CTAs run one after the other
#include "exchange.cu"

constexpr int kMargin = 16;
constexpr u32 kPoison = 0xa5a5a5a5;

template <class T>
T* shared_by_ranks(size_t count) {
  size_t bytes = count * sizeof(T) + 64;
  void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (at == MAP_FAILED) std::exit(1);
  return static_cast<T*>(at);
}

struct Given {
  int tokens;
  std::vector<float> x;
  std::vector<int> ids;
  std::vector<float> weights;
};

// What a rank leaves: words, for all calls.  Rows of 16 bits end with half a word, if need be.
struct Left {
  size_t rows, row_words, sums, of_call;
  u32* words;

  Left(int slots_of_all, int most, int k, int h, int calls)
      : rows(size_t(slots_of_all) * k), row_words((rows * h * sizeof(Row) + 3) / 4),
        sums(size_t(most) * h) {
    of_call = row_words + 2 * rows + sums + 4 * kMargin;
    words = shared_by_ranks<u32>(of_call * calls);
    std::fill(words, words + of_call * calls, kPoison);
  }
  Row* x(int call) { return reinterpret_cast<Row*>(words + of_call * call); }
  int* ids(int call) { return reinterpret_cast<int*>(x(call)) + row_words + kMargin; }
  float* weights(int call) { return reinterpret_cast<float*>(ids(call)) + rows + kMargin; }
  float* delta(int call) { return weights(call) + rows + kMargin; }
};

void launch_late(Index grid, int threads, auto kernel) {
  pause_now_and_then(6, 5000);
  launch(grid, threads, 1, [] { pause_now_and_then(4); }, kernel);
  pause_now_and_then(2);
  make_visible();  // whatever a flag has announced, or should have
}

int main(int, char** argv) {
  auto number = [=](int i) { return std::atoi(argv[1 + i]); };
  int ranks = number(0), most = number(1), slots = number(2), k = number(3), h = number(4);
  int experts = number(5), calls = number(6), threads = number(8), absent = number(11), late = number(12), giving_up = number(13);
  u32 ctas = u32(number(7)), first = u32(std::strtoul(argv[11], nullptr, 10));
  float deadline = float(std::atof(argv[10]));

  std::vector<std::vector<int>> owners;
  for (int r = 0; r < ranks; ++r) owners.push_back(read<int>(experts));
  std::vector<std::vector<Given>> given(calls);
  for (auto& of_call : given)
    for (int r = 0; r < ranks; ++r) {
      int tokens = read<int>(1)[0];
      auto x = read<float>(size_t(most) * h);
      auto ids = read<int>(size_t(most) * k);
      auto weights = read<float>(size_t(most) * k);
      of_call.push_back({tokens, x, ids, weights});
    }

  int most_k = k + 1, most_h = h + 2;  // another layer's
  int element = number(14);
  Mailbox of_one{nullptr, ranks, most, most_k, most_h, element};
  size_t bytes = reinterpret_cast<size_t>(of_one.x(ranks));
  auto* base = shared_by_ranks<u64>(ranks);
  auto* states = shared_by_ranks<State>(ranks);
  auto* controls = shared_by_ranks<Control>(ranks);
  auto* statistics = shared_by_ranks<u64>(size_t(ranks) * (kStatistics + experts));
  std::vector<Left> left;
  for (int r = 0; r < ranks; ++r) {
    base[r] = reinterpret_cast<u64>(shared_by_ranks<char>(bytes));
    std::memset(reinterpret_cast<char*>(base[r]) + 2 * kMostRanks * sizeof(Line), 0xa5,
                bytes - 2 * kMostRanks * sizeof(Line));
    for (int s = 0; s < ranks; ++s)
      for (Line* line : {of_one.dispatched(s), of_one.returned(s)})
        reinterpret_cast<Line*>(base[r] + reinterpret_cast<size_t>(line))->flag = first;
    states[r].call = first;
    controls[r].deadline = deadline;
    left.emplace_back(ranks * slots, most, k, h, calls);
  }

  for (int rank = 0; rank < ranks; ++rank) {
    if (fork()) continue;
    std::srand(u32(number(15) * 100 + rank));
    State* state = states + rank;
    Control* control = controls + rank;
    auto* counted = reinterpret_cast<Statistics*>(statistics + size_t(rank) * (kStatistics + experts));
    const int* owner = owners[rank].data();
    for (int call = 0; call < calls; ++call) {
      if (absent >= 0 && absent % ranks == rank && call >= absent / ranks) _exit(0);
      if (giving_up >= 0 && giving_up % ranks == rank && call == giving_up / ranks)
        store_relaxed(&control->gave_up, 1);
      const Given& mine = given[call][rank];
      Left& out = left[rank];
      Row* x = out.x(call);
      float *weights = out.weights(call), *delta = out.delta(call);
      int* ids = out.ids(call);
      launch_late({ctas, 1, 1}, threads, [&] {
        send_tokens(mine.x.data(), mine.ids.data(), mine.weights.data(), mine.tokens, owner, base,
                    rank, ranks, most, most_k, most_h, element, h, state, counted);
      });
      if (rank == late) usleep(60000);
      launch_late({ctas, u32(ranks), 1}, threads, [&] {
        take_rows(mine.x.data(), mine.ids.data(), mine.weights.data(), mine.tokens, owner, base,
                  rank, ranks, most, most_k, most_h, element, h, slots, x, ids, weights, u32(call),
                  state, control, counted);
      });
      std::vector<float> products(out.rows * h, __uint_as_float(0x7fc00000));
      for (size_t row = 0; row < out.rows; ++row)
        if (ids[row] >= 0)
          for (int i = 0; i < h; ++i)
            products[row * h + i] =
                weights[row] * (Row::to_float(x[row * h + i]) * (1 + float(ids[row]) / 8));
      launch_late({ctas, u32(ranks), 1}, threads, [&] {
        send_products(products.data(), ids, base, rank, ranks, most, most_k, most_h, element, h, slots,
                      state, counted);
      });
      launch_late({ctas, 1, 1}, threads, [&] {
        add_products(products.data(), mine.ids.data(), mine.tokens, owner, base, rank, ranks, most,
                     most_k, most_h, element, h, slots, delta, u32(call), state, control, counted);
      });
    }
    _exit(0);
  }
  int status, failed = 0;
  while (wait(&status) > 0) failed |= status;
  if (failed) return 1;
  std::fwrite(&bytes, sizeof(u64), 1, stdout);
  for (int r = 0; r < ranks; ++r) {
    const u64* numbers = statistics + size_t(r) * (kStatistics + experts);
    std::fwrite(&controls[r].cause, sizeof(u32), 1, stdout);
    std::fwrite(&states[r].call, sizeof(u32), 1, stdout);
    std::fwrite(numbers, sizeof(u64), kStatistics + experts, stdout);
    std::fwrite(left[r].words, sizeof(u32), left[r].of_call * calls, stdout);
  }
}
