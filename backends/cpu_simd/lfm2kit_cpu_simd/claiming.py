"""Shares tasks among the threads of a kernel, one after the other."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic


@intrinsic
def claimed(typingctx: Any, counter: Any) -> Any:
    """Return counter[0] of an int64 array, and add 1 to it; no two threads get the same number."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        array = context.make_array(sig.args[0])(context, builder, args[0])
        return builder.atomic_rmw("add", array.data, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(counter), codegen
