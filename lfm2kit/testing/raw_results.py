"""What a block returned, before it is copied: plain arrays, new, and apart from each other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from lfm2kit import specs
from lfm2kit.memory import HOST
from lfm2kit.specs import Spec
from lfm2kit.testing.compare import each
from lfm2kit.testing.guards import arrays_of_arguments
from lfm2kit.testing.verdicts import CheckFailed

POISON = {"f": np.nan, "i": -7777}  # by the kind of dtype


def require_plain(result: Any, what: str) -> None:
    """Raise `CheckFailed` unless a result on the host is an `ndarray`, C-contiguous and aligned.

    Or a tuple of such.
    """
    for array in each(result):
        if type(array) is not np.ndarray:  # a subclass may calculate otherwise, as np.matrix does
            raise CheckFailed(
                f"{what}: returned {kind_of(array)}; "
                f"arrays in memory '{HOST.name}' are numpy.ndarray"
            )
        if not array.flags.c_contiguous:
            raise CheckFailed(
                f"{what}: returned {described(array)}, not C-contiguous: "
                f"its strides are {array.strides}"
            )
        if not array.flags.aligned:
            raise CheckFailed(f"{what}: returned {described(array)} at an unaligned address")


def require_new(spec: Spec, result: Any, arguments: Sequence[Any]) -> None:
    """Raise `CheckFailed` unless a result on the host is the caller's own.

    It can be written, and shares no memory with an argument or with another result.  The first
    result of an RMSNorm or a layer may be its argument `hidden`.
    """
    arrays = each(result)
    if not all(array.flags.writeable for array in arrays):
        raise CheckFailed(f"{spec}: a result is read-only, but it belongs to the caller")
    if any(np.may_share_memory(a, b) for a, b in combinations(arrays, 2)):
        raise CheckFailed(f"{spec}: its results share memory with each other")
    may_return_hidden = isinstance(spec, specs.RMSNorm | specs.Layer)
    for name, argument in arrays_of_arguments(arguments):
        is_hidden = may_return_hidden and name == "argument 0"
        if any(np.may_share_memory(array, argument) for array in arrays[is_hidden:]):
            raise CheckFailed(f"{spec}: a result shares memory with {name}")


def overwrite(result: Any) -> None:
    """Write NaN, or an impossible id, into all arrays of a result that can be written from here."""
    for array in each(result):
        if hasattr(array, "fill"):
            array.fill(POISON[array.dtype.kind])


def described(result: Any) -> str:
    """Return types and shapes in words: "float32 [17, 24]"."""
    if isinstance(result, tuple):
        return f"({', '.join(map(described, result))})"
    if hasattr(result, "dtype") and hasattr(result, "shape"):
        return f"{result.dtype} {list(result.shape)}"
    return kind_of(result)


def kind_of(value: Any) -> str:
    return "None" if value is None else f"a {type_name(type(value))}"


def type_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
