// Makes a trip with the kernels of channel.cu on the host, which has threads that answer:
//
//     channel TRIP CALL WORKERS ANSWERING FAILING DEADLINE COUNT ROWS SEND RECEIVE TAKES RETURNS
//         < ARRAYS
//
// TRIP is the one before.  ANSWERING of the workers answer, after the first has failed if FAILING
// is 1.  COUNT of the ROWS are sent and received, all if it is negative.  SEND and RECEIVE are CTAs and threads of each, TAKES and RETURNS four numbers of vectors.
// ARRAYS are those that are sent, then those that are answered as they lie in the host's memory.
// What comes out are words (counters, control), the host's inputs, and the arrays received, each
// with some vectors behind it that are to stay as they are.
#include "device.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>

#define __shared__ static  // in a function; CTAs run one after the other
#include "channel.cu"

constexpr int kMargin = 8, kMostWorkers = 8;
constexpr u32 kPoison = 0xa5a5a5a5;

using Vectors = std::vector<uint4>;

int place_of(const int* counts, int array) {
  int place = 0;
  for (int a = 0; a < array; ++a) place += whole_lines(counts[a]);
  return place;
}

Vectors poisoned(int count) {
  return Vectors(count + kMargin, uint4{kPoison, kPoison, kPoison, kPoison});
}

Vectors read(int count) {
  Vectors vectors(count);
  if (std::fread(vectors.data(), sizeof(uint4), count, stdin) != size_t(count)) std::exit(1);
  return vectors;
}

template <class T>
void write(const std::vector<T>& array) {
  std::fwrite(array.data(), sizeof(T), array.size(), stdout);
}

int main(int, char** argv) {
  auto number = [=](int i) { return std::atoi(argv[i]); };
  u32 before = u32(std::strtoul(argv[1], nullptr, 10));
  int call = number(2), workers = number(3), answering = number(4), failing = number(5);
  float deadline = float(std::atof(argv[6]));
  int taken = number(7), rows = number(8), *count = taken < 0 ? nullptr : &taken;
  Index send_grid{u32(number(9)), 1, 1}, receive_grid{u32(number(11)), 1, 1};
  int takes[kArrays], returns[kArrays];
  for (int a = 0; a < kArrays; ++a) takes[a] = number(13 + a), returns[a] = number(17 + a);

  Vectors sent[kArrays], received[kArrays];
  for (int a = 0; a < kArrays; ++a) sent[a] = read(takes[a]), received[a] = poisoned(returns[a]);
  Vectors inputs = poisoned(place_of(takes, kArrays)), results(place_of(returns, kArrays));
  Vectors answer = read(int(results.size()));
  std::vector<u32> control(kAnswered + kMostWorkers * kWorker);
  std::vector<u32> words{before, 0};
  auto* counters = reinterpret_cast<Counters*>(words.data());
  control[0] = before;
  control[DEADLINE] = __float_as_uint(deadline);

  auto worker = [&](int i) {
    while (load_acquire(&control[0]) == before) std::this_thread::yield();
    std::this_thread::sleep_for(std::chrono::microseconds(300 * ((i * 5 + call) % workers)));
    size_t from = results.size() * i / answering, to = results.size() * (i + 1) / answering;
    std::copy(answer.begin() + from, answer.begin() + to, results.begin() + from);
    if (failing) store_relaxed(&control[kFailed], 1);
    store_release(&control[kAnswered + i * kWorker], load_acquire(&control[0]));
  };
  std::vector<std::jthread> answers;
  for (int i = 0; i < answering; ++i) answers.emplace_back(worker, i);
  launch(send_grid, number(10), 1, [] {}, [&] {
    send(sent[0].data(), sent[1].data(), sent[2].data(), sent[3].data(), takes[0], takes[1],
         takes[2], takes[3], inputs.data(), control.data(), counters, call, count, rows);
  });
  launch(receive_grid, number(12), 1, [] {}, [&] {
    receive(received[0].data(), received[1].data(), received[2].data(), received[3].data(),
            returns[0], returns[1], returns[2], returns[3], results.data(), control.data(), counters,
            call, workers, count, rows);
  });
  answers.clear();
  write(words), write(control), write(inputs);
  for (const Vectors& array : received) write(array);
}
