// Trips to threads of the host (channel.py): `send` copies up to four arrays to the host and
// announces a trip, `receive` waits until it has been answered and copies up to four arrays back.
//
// Arrays are copied by vectors, and lie one behind the other in the host's memory, which is mapped:
// each begins a line there (host_layout.py).  `control` is an array of words in it: the newest trip,
// its call and its rows, then the marks of failure and the deadline, then the workers' answers.  With
// a count, which the device has, only this many rows of each array are copied.
//
// What counts is how often something has to cross the link and back before the next can begin.
// `send` does not wait for its stores until all are under way.  `receive` takes a way there and back
// for each look at the answers, and one for everything that it copies: a thread starts all its loads,
// of whatever arrays, before it uses the first of them.  It has found where they lead before.
#include "dependent.cuh"
#include "ordering.cuh"

constexpr int kMostThreads = MOST_THREADS, kOfThread = OF_THREAD, kArrays = 4, kLine = LINE;
constexpr int kFailed = FAILED, kAnswered = ANSWERED, kWorker = WORKER;
static_assert(kFailed % 4 == 0 && DEADLINE == kFailed + 2, "loaded together, as a vector");

struct Counters {
  u32 trip;     // the newest
  u32 arrived;  // CTAs of `send` that have copied their share
};

__device__ inline int whole_lines(int count) { return (count + kLine - 1) / kLine * kLine; }

// The first rows of arrays of `all` rows; all of them without a count.
struct Rows {
  int all, taken;

  __device__ Rows(const int* count, int all) : all(all), taken(count ? *count : all) {}

  // Returns how many of an array's vectors have these rows.
  __device__ int of(int vectors) const {
    return taken == all ? vectors : int(((long long)vectors * taken + all - 1) / all);
  }
};

struct Arrays {
  uint4* at[kArrays];
  int count[kArrays];  // of vectors
  int start[kArrays];  // of each in the host's memory
  int end;             // of them all there

  __device__ Arrays(uint4* a, uint4* b, uint4* c, uint4* d, int of_a, int of_b, int of_c, int of_d)
      : at{a, b, c, d}, count{of_a, of_b, of_c, of_d}, end(0) {
    for (int n = 0; n < kArrays; ++n) start[n] = end, end += whole_lines(count[n]);
  }

  __device__ void keep(Rows rows) {
    end = 0;
    for (int n = 0; n < kArrays; ++n)
      if (count[n] = rows.of(count[n])) end = start[n] + count[n];
  }
};

// Returns the n-th vector from `first` on that this thread copies; the grid has them in order.
__device__ inline int of_thread(int first, int n) {
  return first + int((n * gridDim.x + blockIdx.x) * blockDim.x + threadIdx.x);
}

__device__ inline int of_grid() { return kOfThread * gridDim.x * blockDim.x; }

__device__ inline void copy_to(uint4* host, const uint4* from, int count) {
#pragma unroll 1
  for (int first = 0; first < count; first += of_grid()) {
    uint4 vector[kOfThread];
#pragma unroll
    for (int n = 0; n < kOfThread; ++n)
      if (int i = of_thread(first, n); i < count) vector[n] = from[i];
#pragma unroll
    for (int n = 0; n < kOfThread; ++n)
      if (int i = of_thread(first, n); i < count) host[i] = vector[n];
  }
}

// What a thread copies from the host at once.
struct Wave {
  int place[kOfThread];  // in the host's memory
  uint4* at[kOfThread];  // on the device; null where a line has no vector

  __device__ Wave(const Arrays& arrays, int first) {
#pragma unroll
    for (int n = 0; n < kOfThread; ++n) {
      place[n] = of_thread(first, n);
      at[n] = nullptr;
#pragma unroll
      for (int a = 0; a < kArrays; ++a)
        if (int i = place[n] - arrays.start[a]; i >= 0 && i < arrays.count[a])
          at[n] = arrays.at[a] + i;
    }
  }

  // With a mark of failure all bits are 1.  One thread loads the marks for its CTA: the link carries
  // each thread's load of a word that others store, even if all are of the same word.
  __device__ void copy_from(const uint4* host, const u32* failed) const {
    __shared__ u64 marks;
    uint4 vector[kOfThread];
#pragma unroll
    for (int n = 0; n < kOfThread; ++n)
      if (at[n]) vector[n] = host[place[n]];
    if (threadIdx.x == 0) marks = load_two_relaxed(failed);
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kOfThread; ++n)
      if (at[n]) *at[n] = marks ? uint4{~0u, ~0u, ~0u, ~0u} : vector[n];
    __syncthreads();
  }
};

// Waits until a worker has answered; no longer if there is a mark of failure, and not beyond the
// deadline, which sets one.  One load has the marks and the deadline, so that the host may change it
// and a look takes no more loads; they and the clock are read while the answer is on its way.
__device__ inline void wait_for_answer(const u32* answered, u32 trip, u32* failed, u32 mark) {
  u64 start = nanoseconds();
  for (;;) {
    uint4 marks = load_four_relaxed(failed);
    u64 waited = nanoseconds() - start;
    if (load_acquire(answered) == trip || marks.x || marks.y) return;
    float deadline = __uint_as_float(marks.z);
    if (float(waited) < 1e9f * deadline) continue;
    store_relaxed(failed + 1, mark);
    return;
  }
}

// Only the CTA that is the last to arrive waits until the copies are in the host's memory.
extern "C" __global__ void __launch_bounds__(kMostThreads)
    send(const uint4* a, const uint4* b, const uint4* c, const uint4* d, int of_a, int of_b,
         int of_c, int of_d, uint4* inputs, u32* control, Counters* counters, int call,
         const int* count, int all_rows) {
  wait_for_previous();
  let_next_start();
  u32 trip = counters->trip + 1;
  Rows rows(count, all_rows);
  copy_to(inputs, a, rows.of(of_a));
  copy_to(inputs += whole_lines(of_a), b, rows.of(of_b));
  copy_to(inputs += whole_lines(of_b), c, rows.of(of_c));
  copy_to(inputs += whole_lines(of_c), d, rows.of(of_d));
  __syncthreads();
  if (threadIdx.x > 0) return;
  if (gridDim.x > 1) {
    if (arrive(&counters->arrived) < gridDim.x - 1) return;
    counters->arrived = 0;
  }
  counters->trip = trip;
  store_relaxed(control + 1, call);
  store_relaxed(control + 2, rows.taken);
  store_release(control, trip);
}

// Every CTA looks for the answers itself: to be told by another would take as long.  The marks of
// failure are loaded along with the results: a worker that fails sets its mark before it answers.
extern "C" __global__ void __launch_bounds__(kMostThreads)
    receive(uint4* a, uint4* b, uint4* c, uint4* d, int of_a, int of_b, int of_c, int of_d,
            const uint4* results, u32* control, const Counters* counters, int call, int workers,
            const int* count, int all_rows) {
  Arrays arrays(a, b, c, d, of_a, of_b, of_c, of_d);
  u32* failed = control + kFailed;
  if (count) {
    wait_for_previous();
    arrays.keep(Rows(count, all_rows));
  }
  Wave wave(arrays, 0);
  wait_for_previous();
  let_next_start();
  if (int(threadIdx.x) < workers)
    wait_for_answer(control + kAnswered + threadIdx.x * kWorker, counters->trip, failed, call + 1);
  __syncthreads();
  wave.copy_from(results, failed);
  for (int first = of_grid(); first < arrays.end; first += of_grid())
    Wave(arrays, first).copy_from(results, failed);
}
