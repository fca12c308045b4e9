// The threads of a CTA take turns on one host thread, each with a stack of its own: where one waits,
// another goes on.  The order of turns is random and the same in every run, so that a kernel which lacks
// a barrier reads what is not there yet.
#pragma once
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <utility>
#include <vector>

constexpr size_t kStack = 256 << 10;

struct Barrier {
  int expected, arrived = 0, completed = 0;
};

struct Turn {
  ucontext_t context;
  const Barrier* at = nullptr;  // where the thread waits, or waited last
  int completed = 0;            // how often threads had met there before
  bool has_ended = false;

  bool can_go_on() const { return !has_ended && (!at || at->completed != completed); }
};

inline std::vector<Turn> turns;  // by thread
inline std::vector<int> order;   // of the threads
inline size_t place;             // of the thread that is running, in this order

inline int running() { return order[place]; }

inline void shuffle_turns() {
  for (size_t i = order.size(); --i;) {
    size_t j = std::rand() % (i + 1);
    std::swap(order[i], order[j]);
    if (place == i || place == j) place = i + j - place;
  }
}

inline void let_another_go_on() {
  int before = running();
  size_t looked = 0;
  do {
    if (looked++ == order.size()) std::fputs("all threads wait\n", stderr), std::exit(1);
    place = (place + 1) % order.size();
  } while (!turns[running()].can_go_on());
  if (running() != before) swapcontext(&turns[before].context, &turns[running()].context);
}

inline void wait_at(Barrier& barrier) {
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0, ++barrier.completed;
    return;
  }
  turns[running()].at = &barrier, turns[running()].completed = barrier.completed;
  let_another_go_on();
}

// Calls `run` for each of the threads, and returns when all have returned.
template <class Run>
void take_turns(int threads, Run run) {
  static Run* called;
  static int left;
  static ucontext_t caller;
  called = &run, left = threads, place = 0;
  turns = std::vector<Turn>(threads), order.clear();
  char* stacks = new char[threads * kStack];
  for (Turn& turn : turns) {
    getcontext(&turn.context);
    turn.context.uc_stack.ss_sp = stacks + order.size() * kStack;
    turn.context.uc_stack.ss_size = kStack;
    makecontext(&turn.context, [] {
      (*called)(running());
      turns[running()].has_ended = true;
      if (--left) let_another_go_on();
      setcontext(&caller);
    }, 0);
    order.push_back(int(order.size()));
  }
  swapcontext(&caller, &turns[0].context);
  delete[] stacks;
}
