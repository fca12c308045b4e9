"""What a worker does: one loop of machine code, without Python's lock, from its start to its end.

It waits for a trip, calls its share of a block, and raises its own flag.  The first worker looks at
the memory's flag.  It passes a call of several shares on to the others, who look at its word and
take no part in anything else: were all to look at the memory's flag, each would fetch its line anew
at every trip.

Waking needs no Python either.  `begin` wakes the first worker, and this one wakes the others: as
soon as a forward begins if the one before had a call of several shares, otherwise when there is
such a call.  Workers look on for a while after a forward, and then sleep.

A block that needs Python computes on all cores, in the first worker's name.  The others sleep
until it has returned (`call_back`): one that looked on could take a core from it, even if it
offered the core at every look, because some versions of Linux give such a thread its share all the
same.  All threads of the block would then wait for the one without a core.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from lfm2kit_cpu_simd.compiling import kernel
from numba import types

from lfm2kit_hybrid.board import (
    ASLEEP,
    CLOSED,
    NOTED,
    OF_WORKER,
    READ_END,
    SEEN,
    SERVING,
    SHARED_BY,
    TABLE,
    TURN,
    TURNS_CALL,
    WANTED,
    WORKERS,
    WRITE_END,
)
from lfm2kit_hybrid.instructions import (
    call_native,
    fence,
    load_acquire,
    load_long,
    pause,
    sched_yield,
    sleep_at,
    store_release,
    write_byte,
)

# Why `poll` returns.
OVER, CALL = range(2)  # the board is closed; a block needs Python

# An entry of the table of calls: eight int64 each.
FUNCTION, ARGUMENT, INPUTS, RESULTS, ROWS, PARTS = range(6)
ENTRY = 8
ENTRY_BYTES = 8 * ENTRY

# How often a worker looks in vain, at 30 to 50 ns a look, before it does something else.
# After PAUSES it offers the core that it runs on to others, unless the core is its own: to offer
# one that nobody wants costs a trip 18 us.
PAUSES = 1_000
LINGER = 5_000  # then it sleeps between forwards: some 200 us, in which the next step often begins
PATIENCE = 10_000_000  # then it sleeps in a forward that needs it: about half a second
NAP = 20  # milliseconds; the first worker then looks again, as the memory cannot wake it
FOR_EVER = -1

ADDRESS, COUNT = types.intp, types.int64


@kernel(types.void(ADDRESS, types.uint32))
def publish(address: int, value: int) -> None:
    """Write a number that others look at, after all that was written before."""
    store_release(address, value)


@kernel(types.uint32(ADDRESS))
def observe(address: int) -> Any:
    """Return a number that others write; what they wrote before can be read afterwards."""
    return load_acquire(address)


@kernel(types.void(ADDRESS, COUNT))
def wake(board: int, worker: int) -> None:
    """Let a worker look at the board, wherever it sleeps."""
    write_byte(np.int32(load_acquire(board + WORKERS + OF_WORKER * worker + WRITE_END)))


@kernel(types.void(ADDRESS, COUNT, COUNT, types.uint32))
def want(board: int, first: int, last: int, forward: int) -> None:
    """Tell the workers from `first` to before `last` that a forward needs them, and wake them.

    Who is about to sleep says so first and then looks for the last time: it has seen what was
    written before this, or is seen here.
    """
    for worker in range(first, last):
        wanted = board + WORKERS + OF_WORKER * worker + WANTED
        if load_acquire(wanted) != forward:
            store_release(wanted, forward)
    fence()
    for worker in range(first, last):
        if load_acquire(board + WORKERS + OF_WORKER * worker + ASLEEP) != 0:
            wake(board, worker)


@kernel(types.void(ADDRESS))
def begin(board: int) -> None:
    """Let the first worker serve a new forward."""
    forward = np.uint32((load_acquire(board + SERVING) + 1) | 1)
    store_release(board + SERVING, forward)
    want(board, 0, 1, forward)


@kernel(types.void(ADDRESS))
def end(board: int) -> None:
    """Let no worker begin a call any more."""
    store_release(board + SERVING, np.uint32((load_acquire(board + SERVING) | 1) + 1))


@numba.njit(inline="always")
def _note(board: int, own: int, worker: int, serving: int) -> Any:
    """Note that a forward has begun or ended; return whether the one before needed this worker."""
    was_wanted = load_acquire(own + WANTED) == load_acquire(own + NOTED)
    store_release(own + NOTED, serving)
    if worker == 0 and serving & 1:
        shared_by = load_acquire(own + SHARED_BY)
        store_release(own + SHARED_BY, np.uint32(1))
        if shared_by > 1:
            want(board, 1, shared_by, serving)
    return was_wanted


@kernel(types.void(ADDRESS, types.uint32, types.uint32, COUNT, types.uint32))
def pass_on(board: int, trip: int, call: int, parts: int, forward: int) -> None:
    """Tell the other workers of a trip, and wake those who have a share in it."""
    store_release(board + TURNS_CALL, call)
    store_release(board + TURN, trip)
    if parts > 1:
        want(board, 1, parts, forward)


@kernel(types.void(ADDRESS))
def call_back(board: int) -> None:
    """Wake the workers that slept while a block computed, if their forward has shares for them."""
    forward = load_acquire(board + SERVING)
    if forward & 1:
        want(board, 1, load_acquire(board + WORKERS + SHARED_BY), forward)


@numba.njit(inline="always")
def _rest(watched: int, own: int, trip: int, wanted: int, milliseconds: int) -> None:
    """Sleep, unless a trip has come or the worker is wanted anew."""
    store_release(own + ASLEEP, np.uint32(1))
    fence()
    if load_acquire(watched) == trip and load_acquire(own + WANTED) == wanted:
        sleep_at(np.int32(load_acquire(own + READ_END)), np.int32(milliseconds))
    store_release(own + ASLEEP, np.uint32(0))


@kernel(COUNT(*[ADDRESS] * 4, *[COUNT] * 4))
def poll(
    board: int,
    sent: int,
    failed: int,
    answered: int,
    worker: int,
    pauses: int,
    linger: int,
    patience: int,
) -> int:
    """Answer the trips that a worker can answer, until there is something else to do.

    The first four are addresses: of the board, of the channel's `sent` and `failed`, and of what
    this worker has `answered`.  It offers its core to others after `pauses` looks in vain, and
    sleeps after `linger`, or `patience` if the forward needs it.
    """
    own = board + WORKERS + OF_WORKER * worker
    watched = sent if worker == 0 else board + TURN
    looks = 0
    while True:
        # In this order: who is wanted finds the trip and the forward for which it is, and the trip
        # belongs to no later forward.
        wanted = load_acquire(own + WANTED)
        trip = load_acquire(watched)
        serving = load_acquire(board + SERVING)
        if load_acquire(board + CLOSED) != 0:
            return OVER
        if serving != load_acquire(own + NOTED):
            if _note(board, own, worker, serving):
                looks = 0
            continue
        if serving & 1 == 0 or trip == load_acquire(own + SEEN):
            looks += 1
            if looks < (patience if wanted == serving else linger):
                if looks < pauses:
                    pause()
                else:
                    sched_yield()
            elif worker == 0 and wanted == serving:
                _rest(watched, own, trip, wanted, NAP)
            else:
                _rest(watched, own, trip, wanted, FOR_EVER)
                looks = 0
            continue
        looks = 0
        # If the trip does not wait for this worker, this may be the next trip's call.  The share
        # is then computed twice, but the next trip is answered after the second time.
        call = load_acquire(watched + 4)
        entry = load_long(board + TABLE)  # of the table
        entry += ENTRY_BYTES * call
        parts = load_long(entry + 8 * PARTS)
        function = load_long(entry + 8 * FUNCTION)
        is_failed = load_acquire(failed) != 0 or load_acquire(failed + 4) != 0
        if worker != 0 and function == 0:
            looks = max(linger, patience)  # a block that needs Python computes on all cores
        if worker == 0 and not is_failed and (parts > 1 or function == 0):
            pass_on(board, trip, call, parts, serving)
            if parts > load_acquire(own + SHARED_BY):
                store_release(own + SHARED_BY, np.uint32(parts))
        if worker < parts:
            if function == 0 and not is_failed:
                return CALL
            if not is_failed:
                call_native(
                    function,
                    load_long(entry + 8 * ARGUMENT),
                    load_long(entry + 8 * INPUTS),
                    load_long(entry + 8 * RESULTS),
                    load_long(entry + 8 * ROWS),
                    worker,
                    parts,
                )
            store_release(answered, trip)
        store_release(own + SEEN, trip)
