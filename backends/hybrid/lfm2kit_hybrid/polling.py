"""What a worker does while a forward runs: one loop of machine code, without Python's lock.

It waits for the memory's flag, calls its share of a block, and raises its own flag.  Numbers in the
shared memory are read with acquire and written with release semantics, because the other side is
not this process's code: a GPU, or another thread.
"""

from __future__ import annotations

import platform
from typing import Any

from lfm2kit_cpu_simd.compiling import kernel
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

# Why `poll` returns.
OVER, CALL, QUIET = range(3)  # the forward has ended; a block needs Python; nothing has come

# An entry of the table of calls: eight int64 each.
FUNCTION, ARGUMENT, INPUTS, RESULTS, ROWS, PARTS = range(6)
ENTRY = 8
ENTRY_BYTES = 8 * ENTRY

PAUSES = 1_000  # looks at the flag, some 50 us, after which the core is offered to others
PATIENCE = 1_000_000  # looks, about half a second, after which a worker goes to sleep

WORD, LONG = ir.IntType(32), ir.IntType(64)
PAUSE = "llvm.aarch64.hint" if platform.machine() in ("aarch64", "arm64") else "llvm.x86.sse2.pause"


@intrinsic
def load_acquire(typingctx: Any, address: Any) -> Any:
    """Return the uint32 at an address; what was written before it can be read afterwards."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_pointer(builder, args[0], WORD), "acquire", 4)

    return types.uint32(types.intp), codegen


@intrinsic
def store_release(typingctx: Any, address: Any, value: Any) -> Any:
    """Write a uint32 at an address, after all that was written before."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store_atomic(args[1], _pointer(builder, args[0], WORD), "release", 4)
        return context.get_dummy_value()

    return types.void(types.intp, types.uint32), codegen


@intrinsic
def load_long(typingctx: Any, address: Any) -> Any:
    """Return the int64 at an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_pointer(builder, args[0], LONG))

    return types.int64(types.intp), codegen


@intrinsic
def call_native(
    typingctx: Any,
    function: Any,
    argument: Any,
    inputs: Any,
    results: Any,
    rows: Any,
    part: Any,
    parts: Any,
) -> Any:
    """Call the function at an address, as `lfm2kit.backend.NativeCall` says."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function = ir.FunctionType(ir.VoidType(), [LONG] * 6)  # pointers travel as integers do
        builder.call(_pointer(builder, args[0], function), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), codegen


def _instruction(name: str, result: Any, *values: int) -> Any:
    """Return an intrinsic that calls the C function, or the instruction of LLVM's, of this name."""

    @intrinsic
    def instruction(typingctx: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            function = ir.FunctionType(result, [WORD] * len(values))
            called = cgutils.get_or_insert_function(builder.module, function, name)
            builder.call(called, [WORD(value) for value in values])
            return context.get_dummy_value()

        return types.void(), codegen

    return instruction


pause = _instruction(PAUSE, ir.VoidType(), *[1] * ("aarch64" in PAUSE))  # 1: yield
sched_yield = _instruction("sched_yield", WORD)


def _pointer(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


ADDRESS = types.intp
POLL = types.int64(*[ADDRESS] * 6, types.uint32, types.int64, types.int64)


@kernel(POLL, nogil=True)
def poll(
    sent: int,
    failed: int,
    answered: int,
    seen: int,
    table: int,
    serving: int,
    generation: int,
    worker: int,
    patience: int,
) -> int:
    """Answer the trips that a worker can answer, until there is something else to do.

    The first six are addresses: of the channel's `sent` and `failed`, of what this worker has
    `answered`, of the trip that it has `seen`, of the table's address, and of the number of the
    forward that is served.  The worker serves `generation`, and after `patience` looks in vain
    returns QUIET.
    """
    looks = 0
    while True:
        trip = load_acquire(sent)
        # Looked at after the trip, which is therefore none of a later forward.
        if load_acquire(serving) != generation:
            return OVER
        if trip == load_acquire(seen):
            looks += 1
            if looks >= patience:
                return QUIET
            if looks < PAUSES:
                pause()
            else:
                sched_yield()
            continue
        looks, patience = 0, PATIENCE
        # If the trip does not wait for this worker, this may be the next trip's call.  The share
        # is then computed twice, but the next trip is answered after the second time.
        entry = load_long(table) + ENTRY_BYTES * load_acquire(sent + 4)
        parts = load_long(entry + 8 * PARTS)
        if worker < parts:
            is_failed = load_acquire(failed) != 0 or load_acquire(failed + 4) != 0
            function = load_long(entry + 8 * FUNCTION)
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
        store_release(seen, trip)


@kernel(types.void(ADDRESS, types.uint32))
def publish(address: int, value: int) -> None:
    """Write a number that others look at, after all that was written before."""
    store_release(address, value)


@kernel(types.uint32(ADDRESS))
def observe(address: int) -> Any:
    """Return a number that others write; what they wrote before can be read afterwards."""
    return load_acquire(address)
