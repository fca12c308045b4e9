// The exchange of tokens between the GPUs of a machine (exchange.py): `send_tokens` and `take_rows`
// are its dispatch, `send_products` and `add_products` its combine.  t tokens of this rank, k experts
// of a token, h hidden_size, e experts, r rows for this rank's experts.  ROW is the type in which experts
// read rows: F32, or one of 16 bits, to which a token's rank rounds them before they are sent.
//
// Each rank has a mailbox, which all others have mapped.  A place in it follows from the rank, token
// and k that it is for, so ranks tell each other no positions, and nobody needs to know how many rows
// come: a token's row lies at its number among its rank's tokens, and a product at its token and k.
// The ids of a token's row are -1 for experts of other ranks, as those of rows that are padding.
//
// A rank's calls have numbers, which its GPU counts: a graph that is replayed makes new ones.  A flag
// holds the number of the call whose data are there.  No place needs a second copy for the next call.
// Who has seen all products of a call knows that all ranks have taken its tokens, because they send
// products after that; and who has seen all tokens of a call knows that all ranks have added the
// products of the call before.  So every rank waits for every other one, also for those that have
// nothing for it.
//
// A wait ends at the deadline.  Then, or if the host gives up, the cause is noted in the host's memory
// and passed on in the flags: each rank's waits end, and its rows and sums are nobody's and NaN.
#include "dependent.cuh"
#include "peers.cuh"
#include "types.cuh"
#include "vector.cuh"

using Row = ROW;

constexpr int kThreads = THREADS, kMostRanks = MOST_RANKS, kLine = LINE;
constexpr int kLanes = LANES;   // threads that have a row together; a CTA has several rows at once
constexpr int kTogether = 8;    // parts of a row that a thread asks for before it stores the first
constexpr int kStatistics = STATISTICS;  // numbers before those of the experts
constexpr u32 kFailed = ~0u;             // in a flag: there is a cause instead of data
constexpr u64 kLook = 100000;            // ns between two looks at the host's memory
constexpr u32 kLate = 0, kGaveUp = 1;    // kinds of causes

// What has come from one rank.
struct Line {
  u32 flag;
  u32 tokens;  // or a cause
  u32 unused[kLine - 2];
};

// A rank's own numbers.
struct State {
  u32 call;     // the newest
  u32 arrived;  // CTAs that have sent their share
  u32 cause;    // 0 unless the exchange has failed
};

// What the host has mapped.
struct Control {
  u32 gave_up;  // the host ends all waits
  u32 cause;
  float deadline;  // in seconds
};

// What a layer's exchange has done since the host has last looked, followed by the rows of each expert.
struct Statistics {
  u64 calls, tokens, rows_sent, products_sent, ns_of_dispatch, ns_of_combine;
};
static_assert(sizeof(Statistics) == 8 * kStatistics, "as exchange.py reads them");

// The place of everything in a mailbox that has room for `tokens` tokens of each rank, and the largest
// k, h and bytes of an element of a row of all layers: the same in all mailboxes and calls.
struct Mailbox {
  char* at;
  int ranks, tokens, k, h, element;

  __device__ Line* dispatched(int source) const { return reinterpret_cast<Line*>(at) + source; }
  __device__ Line* returned(int source) const { return dispatched(kMostRanks + source); }
  __device__ size_t pairs() const { return size_t(tokens) * k; }
  __device__ float* products() const {  // [tokens][k][h]
    return reinterpret_cast<float*>(dispatched(2 * kMostRanks));
  }
  __device__ int* ids(int source) const {  // [ranks][tokens][k]
    return reinterpret_cast<int*>(products() + pairs() * h) + source * pairs();
  }
  __device__ float* weights(int source) const {  // [ranks][tokens][k]
    return reinterpret_cast<float*>(ids(ranks)) + source * pairs();
  }
  __device__ Row* x(int source) const {  // [ranks][tokens][h]; last, as it may end in half a word
    char* first = reinterpret_cast<char*>(weights(ranks));
    return reinterpret_cast<Row*>(first + size_t(source) * tokens * h * element);
  }
};

// The mailboxes of all ranks, as this one sees them.
struct Ranks {
  const u64* base;  // of each
  int rank, ranks, tokens, k, h, element;

  __device__ Mailbox of(int r) const {
    return {reinterpret_cast<char*>(base[r]), ranks, tokens, k, h, element};
  }
  __device__ Mailbox own() const { return of(rank); }
};

__device__ inline u32 following(u32 call) { return call + 1 == kFailed ? 0 : call + 1; }

// Returns why the exchange has failed in a layer, and which rank is the cause.
__device__ inline u32 cause_of(u32 kind, int rank, u32 layer) {
  return layer << 8 | (1 + 2 * rank + kind);
}

// Notes the cause, unless one is known.
__device__ inline void fail(u32 cause, State* state, Control* control) {
  if (load_relaxed(&state->cause)) return;
  store_relaxed(&state->cause, cause);
  store_relaxed(&control->cause, cause);
}

// Waits for a rank's call, and returns whether its data are there.  The line and the state lie in this
// GPU's memory.  The host's is far: a thread that looks at it sees a flag late, and looks of many
// threads delay each other.  So only the threads of one CTA look, now and then.
__device__ inline bool has_come(const Line* line, u32 call, int source, int rank, u32 layer,
                                bool looks_at_host, State* state, Control* control) {
  u64 start = nanoseconds(), looked = start;
  for (;;) {
    u32 flag = load_acquire(&line->flag);
    if (flag == call) return true;
    if (flag == kFailed) {
      fail(load_relaxed(&line->tokens), state, control);
      return false;
    }
    if (load_relaxed(&state->cause)) return false;
    u64 now = nanoseconds();
    if (!looks_at_host || now - looked < kLook) continue;
    looked = now;
    if (load_relaxed(&control->gave_up)) {
      fail(cause_of(kGaveUp, rank, layer), state, control);
      return false;
    }
    float deadline = __uint_as_float(load_relaxed(reinterpret_cast<u32*>(&control->deadline)));
    if (float(now - start) < 1e9f * deadline) continue;
    fail(cause_of(kLate, source, layer), state, control);
    return false;
  }
}

// Waits for the lines of the ranks from `first` on, `count` of them, a thread for each; returns whether
// all of their data are there.  All threads of a CTA call it.  The CTA of a kernel that looks at the host
// waits for all ranks, and so it ends what any other CTA waits for.
__device__ inline bool have_come(Line* lines, int first, int count, int rank, u32 layer,
                                 bool looks_at_host, State* state, Control* control) {
  __shared__ int failed;
  if (threadIdx.x == 0) failed = load_relaxed(&state->cause) != 0;
  __syncthreads();
  int source = first + threadIdx.x;
  if (int(threadIdx.x) < count && source != rank && !failed)
    if (!has_come(lines + source, state->call, source, rank, layer, looks_at_host, state, control))
      failed = 1;
  __syncthreads();
  return !failed;
}

// Which rows a thread has: `first`, `first + step`, ..., with the other lanes.  Neighbouring rows are in
// different CTAs, so that few rows are spread over the device too.
struct Rows {
  int first, step, lane;

  __device__ Rows() {
    first = threadIdx.x / kLanes * gridDim.x + blockIdx.x;
    step = blockDim.x / kLanes * gridDim.x;
    lane = threadIdx.x % kLanes;
  }
};

// A part of a row as experts read it.
__device__ inline Narrow<Row> rounded(Vector part) {
  Narrow<Row> row;
  store(row.of, part);
  return row;
}

// Calls put(i, part) for the parts of a row that a thread has.
template <class Stored, class Put>
__device__ inline void for_parts(const Stored* row, int h, int lane, Put put) {
  constexpr int kStep = kLanes * VECTOR;
  for (int i0 = lane * VECTOR; i0 < h; i0 += kTogether * kStep) {
    Vector parts[kTogether];
#pragma unroll
    for (int n = 0; n < kTogether; ++n)
      if (i0 + n * kStep < h) parts[n] = load(row + i0 + n * kStep);
#pragma unroll
    for (int n = 0; n < kTogether; ++n)
      if (i0 + n * kStep < h) put(i0 + n * kStep, parts[n]);
  }
}

// Ends a CTA of a kernel that sends: the last one raises the flags of all other ranks.
template <class LineOf>
__device__ inline void announce(u32 call, u32 tokens, const Ranks& all, State* state, LineOf line_of) {
  __shared__ bool is_last;
  __syncthreads();  // the threads of this CTA have stored their share
  if (threadIdx.x == 0) is_last = arrive(&state->arrived) == gridDim.x * gridDim.y - 1;
  __syncthreads();
  if (!is_last) return;
  u32 cause = state->cause;
  if (threadIdx.x == 0) state->arrived = 0, state->call = call;
  int r = threadIdx.x;
  if (r >= all.ranks || r == all.rank) return;
  Line* line = line_of(all.of(r));
  store_relaxed(&line->tokens, cause ? cause : tokens);
  raise_flag(&line->flag, cause ? kFailed : call);
}

// A token's row and its ids to every other rank that has experts of it; ids to all of them.
extern "C" __global__ void __launch_bounds__(kThreads)
    send_tokens(const float* x_th, const int* ids_tk, const float* weights_tk, int tokens,
                const int* owners_e, const u64* base, int rank, int ranks, int most, int most_k,
                int most_h, int element, int h, State* state, Statistics* statistics) {
  Ranks all{base, rank, ranks, most, most_k, most_h, element};
  Rows mine;
  wait_for_previous();
  let_next_start();
  u32 call = following(state->call);
  bool is_alive = !state->cause;
  int sent = 0;
  for (int t = mine.first; t < tokens && is_alive; t += mine.step) {
    size_t pair = size_t(t) * TAKEN;
    u32 wanted = 0;
#pragma unroll
    for (int j = 0; j < TAKEN; ++j)
      if (int id = ids_tk[pair + j]; id >= 0) wanted |= 1u << owners_e[id];
    wanted &= ~(1u << rank);
    sent += __popc(wanted);
    for (int i = mine.lane; i < ranks * TAKEN; i += kLanes) {
      int to = i / TAKEN, j = i % TAKEN;
      if (to == rank) continue;
      int id = ids_tk[pair + j];
      store_to_peer(all.of(to).ids(rank) + pair + j, id >= 0 && owners_e[id] == to ? id : -1);
      store_to_peer(all.of(to).weights(rank) + pair + j, weights_tk[pair + j]);
    }
    if (!wanted) continue;
    for_parts(x_th + size_t(t) * h, h, mine.lane, [&](int i, Vector part) {
      Narrow<Row> row = rounded(part);
      for (int to = 0; to < ranks; ++to)
        if (wanted >> to & 1)
          store_to_peer(reinterpret_cast<Narrow<Row>*>(all.of(to).x(rank) + size_t(t) * h + i), row);
    });
  }
  if (mine.lane == 0 && sent) atomicAdd(&statistics->rows_sent, u64(sent));
  if (threadIdx.x == 0 && blockIdx.x == 0) {
    atomicAdd(&statistics->calls, u64(1));
    atomicAdd(&statistics->tokens, u64(tokens));
  }
  announce(call, tokens, all, state, [=](Mailbox box) { return box.dispatched(rank); });
}

// Rows for this rank's experts, `slots` * k of each rank: row (source * slots + t) * k + j is the j-th
// expert of the source's token t, or padding.  blockIdx.y is the source.
extern "C" __global__ void __launch_bounds__(kThreads)
    take_rows(const float* x_th, const int* ids_tk, const float* weights_tk, int tokens,
              const int* owners_e, const u64* base, int rank, int ranks, int most, int most_k,
              int most_h, int element, int h, int slots, Row* rows_rh, int* ids_r, float* weights_r,
              u32 layer, State* state, Control* control, Statistics* statistics) {
  Mailbox box = Ranks{base, rank, ranks, most, most_k, most_h, element}.own();
  Rows mine;
  int source = blockIdx.y;
  bool is_first = blockIdx.x == 0 && source == 0, is_own = source == rank;
  wait_for_previous();
  u64 start = nanoseconds();
  bool is_there = have_come(box.dispatched(0), is_first ? 0 : source, is_first ? ranks : 1, rank, layer,
                            is_first, state, control);
  if (is_first && threadIdx.x == 0)
    atomicAdd(&statistics->ns_of_dispatch, nanoseconds() - start);
  let_next_start();
  auto* rows_of_e = reinterpret_cast<u64*>(statistics + 1);
  const int* ids = is_own ? ids_tk : box.ids(source);
  const float* weights = is_own ? weights_tk : box.weights(source);
  int came = is_own ? tokens : int(load_relaxed(&box.dispatched(source)->tokens));
  if (!is_there) came = 0;
  for (int t = mine.first; t < slots; t += mine.step) {
    size_t pair = size_t(t) * TAKEN, row = (size_t(source) * slots + t) * TAKEN;
    u32 taken = 0;
#pragma unroll
    for (int j = 0; j < TAKEN; ++j) {
      int id = t < came ? ids[pair + j] : -1;
      if (id >= 0 && is_own && owners_e[id] != rank) id = -1;
      if (id >= 0) taken |= 1u << j;
      if (mine.lane != j % kLanes) continue;
      ids_r[row + j] = id;
      weights_r[row + j] = id >= 0 ? weights[pair + j] : 0.0f;
      if (id >= 0) atomicAdd(rows_of_e + id, u64(1));
    }
    if (!taken) continue;
    auto put = [&](int i, Vector part) {
#pragma unroll
      for (int j = 0; j < TAKEN; ++j)
        if (taken >> j & 1) store(rows_rh + (row + j) * h + i, part);
    };
    size_t first = size_t(t) * h;
    if (is_own) for_parts(x_th + first, h, mine.lane, put);
    else for_parts(box.x(source) + first, h, mine.lane, put);
  }
}

// The product of each row that is not padding back to the rank of its token.  blockIdx.y is that rank.
extern "C" __global__ void __launch_bounds__(kThreads)
    send_products(const float* products_rh, const int* ids_r, const u64* base, int rank, int ranks,
                  int most, int most_k, int most_h, int element, int h, int slots, State* state,
                  Statistics* statistics) {
  Ranks all{base, rank, ranks, most, most_k, most_h, element};
  Rows mine;
  int to = blockIdx.y, sent = 0;
  wait_for_previous();
  let_next_start();
  u32 call = state->call;
  bool is_sending = to != rank && !state->cause;
  float* products = all.of(to).products();
  for (int p = mine.first; p < slots * TAKEN && is_sending; p += mine.step) {
    size_t row = size_t(to) * slots * TAKEN + p;
    if (ids_r[row] < 0) continue;
    sent += 1;
    for_parts(products_rh + row * h, h, mine.lane, [&](int i, Vector part) {
      store_to_peer(reinterpret_cast<Vector*>(products + size_t(p) * h + i), part);
    });
  }
  if (mine.lane == 0 && sent) atomicAdd(&statistics->products_sent, u64(sent));
  announce(call, 0, all, state, [=](Mailbox box) { return box.returned(rank); });
}

// delta_th[t] = the sum of its products in the order of k.  An id of -1 counts as -0, which changes no
// bit of a sum; without any other id the sum is +0 (see `combine` in experts.cu).
extern "C" __global__ void __launch_bounds__(kThreads)
    add_products(const float* products_rh, const int* ids_tk, int tokens, const int* owners_e,
                 const u64* base, int rank, int ranks, int most, int most_k, int most_h, int element,
                 int h, int slots, float* delta_th, u32 layer, State* state, Control* control,
                 Statistics* statistics) {
  Mailbox box = Ranks{base, rank, ranks, most, most_k, most_h, element}.own();
  Rows mine;
  wait_for_previous();
  u64 start = nanoseconds();
  bool is_first = blockIdx.x == 0;
  bool is_there = have_come(box.returned(0), 0, ranks, rank, layer, is_first, state, control);
  if (is_first && threadIdx.x == 0)
    atomicAdd(&statistics->ns_of_combine, nanoseconds() - start);
  let_next_start();
  for (int t = mine.first; t < tokens; t += mine.step) {
    size_t pair = size_t(t) * TAKEN;
    const float* from[TAKEN];  // null for an id of -1
    bool is_any_there = false;
#pragma unroll
    for (int j = 0; j < TAKEN; ++j) {
      int id = ids_tk[pair + j];
      const float* own = products_rh + ((size_t(rank) * slots + t) * TAKEN + j) * h;
      from[j] = id < 0 ? nullptr : owners_e[id] == rank ? own : box.products() + (pair + j) * h;
      is_any_there |= id >= 0;
    }
    for (int i = mine.lane * VECTOR; i < h; i += kLanes * VECTOR) {
      Vector products[TAKEN], sum;
#pragma unroll
      for (int j = 0; j < TAKEN; ++j)
        if (from[j]) products[j] = load(from[j] + i);
#pragma unroll
      for (int v = 0; v < VECTOR; ++v) {
        sum.of[v] = is_any_there ? -0.0f : 0.0f;
#pragma unroll
        for (int j = 0; j < TAKEN; ++j)
          sum.of[v] = __fadd_rn(sum.of[v], from[j] ? products[j].of[v] : -0.0f);
        if (!is_there) sum.of[v] = __uint_as_float(0x7fffffff);
      }
      store(delta_th + size_t(t) * h + i, sum);
    }
  }
}
