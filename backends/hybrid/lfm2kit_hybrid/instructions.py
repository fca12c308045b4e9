"""What machine code of a worker says to the processor and to the system.

Numbers in shared memory are read with acquire and written with release semantics, because the other
side is not this process's code: a GPU, or another thread.

A thread sleeps at a pipe, and whoever wakes it writes a byte.  Linux and macOS both have that, and
waiting for it may be given a limit; futexes belong to Linux alone, and cost as much.  A byte that
nobody needs does no harm: the thread wakes once for nothing.
"""

from __future__ import annotations

import platform
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

WORD, LONG, BYTE = ir.IntType(32), ir.IntType(64), ir.IntType(8)
PAUSE = "llvm.aarch64.hint" if platform.machine() in ("aarch64", "arm64") else "llvm.x86.sse2.pause"
POLLIN = 1  # of poll(2): there is something to read
BYTES = 64  # that are read at once


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
def fence(typingctx: Any) -> Any:
    """Read what follows only after all that was written before can be seen by others.

    Of two threads that each write, fence and read what the other writes, one sees the other's.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


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
            _call(builder, name, result, *[WORD(value) for value in values])
            return context.get_dummy_value()

        return types.void(), codegen

    return instruction


pause = _instruction(PAUSE, ir.VoidType(), *[1] * ("aarch64" in PAUSE))  # 1: yield
sched_yield = _instruction("sched_yield", WORD)


@intrinsic
def sleep_at(typingctx: Any, pipe: Any, milliseconds: Any) -> Any:
    """Sleep until there are bytes in the pipe, and take them; with -1 milliseconds, however long.

    A signal ends the sleep as well.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pipe, milliseconds = args
        request = cgutils.alloca_once(builder, ir.LiteralStructType([WORD, WORD]))  # struct pollfd
        builder.store(pipe, cgutils.gep_inbounds(builder, request, 0, 0))
        builder.store(WORD(POLLIN), cgutils.gep_inbounds(builder, request, 0, 1))
        found = _call(builder, "poll", WORD, request, LONG(1), milliseconds)
        with builder.if_then(builder.icmp_signed(">", found, WORD(0))):
            taken = cgutils.alloca_once(builder, ir.ArrayType(BYTE, BYTES))
            _call(builder, "read", LONG, pipe, taken, LONG(BYTES))
        return context.get_dummy_value()

    return types.void(types.int32, types.int32), codegen


@intrinsic
def write_byte(typingctx: Any, pipe: Any) -> Any:
    """Wake who sleeps at the pipe; a pipe that is full wakes anyway."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte = cgutils.alloca_once_value(builder, BYTE(0))
        _call(builder, "write", LONG, args[0], byte, LONG(1))
        return context.get_dummy_value()

    return types.void(types.int32), codegen


def _call(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    function = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), arguments)


def _pointer(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())
