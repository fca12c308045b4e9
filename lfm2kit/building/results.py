"""Checks what a backend builds, so that its mistake is named and harms no other block.

A block is looked at when it is built, and its results at its first call with each number of rows: a
kernel that is given too few rows would read beyond them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from lfm2kit import specs
from lfm2kit.backend import Block, CallsNatively, Operator
from lfm2kit.building.placement import Placed
from lfm2kit.errors import Lfm2kitError
from lfm2kit.specs import Shape, Spec

Shapes = tuple[Shape, ...]  # of a block's results

MOST = 4096  # numbers of rows that a block remembers

# How many arguments a block takes, by its spec's type.
ARGUMENTS: Mapping[type[Spec], int] = {
    specs.Embedding: 1,
    specs.RMSNorm: 2,
    specs.ShortConv: 3,
    specs.Attention: 3,
    specs.MLP: 1,
    specs.Scores: 1,
    specs.Choice: 1,
    specs.Router: 1,
    specs.Experts: 3,
    specs.SparseMoe: 1,
    specs.LastRows: 3,
    specs.LMHead: 1,
    specs.Layer: 4,
    specs.Model: 2,
}

# What a block returns for its arguments, by its spec's type.
RETURNED: Mapping[type[Spec], Callable[..., Shapes]] = {
    specs.Embedding: lambda spec, batch: ((batch.tokens, spec.hidden_size),),
    specs.RMSNorm: lambda spec, hidden, delta: (hidden.shape, hidden.shape),
    specs.ShortConv: lambda spec, x, batch, state: (x.shape,),
    specs.Attention: lambda spec, x, batch, state: (x.shape,),
    specs.MLP: lambda spec, x: (x.shape,),
    specs.Scores: lambda spec, x: ((x.shape[0], spec.num_experts),),
    specs.Choice: lambda spec, scores: ((scores.shape[0], spec.num_experts_per_tok),) * 2,
    specs.Router: lambda spec, x: ((x.shape[0], spec.num_experts_per_tok),) * 2,
    specs.Experts: lambda spec, x, ids, weights: (x.shape,),
    specs.SparseMoe: lambda spec, x: (x.shape,),
    specs.LastRows: lambda spec, hidden, delta, batch: (
        ((batch.logits_rows.shape[0], spec.hidden_size),) * 2
    ),
    specs.LMHead: lambda spec, x: ((x.shape[0], spec.vocab_size),),
    specs.Layer: lambda spec, hidden, delta, batch, state: (hidden.shape, hidden.shape),
    specs.Model: lambda spec, batch, state: (
        (batch.logits_rows.shape[0], spec.lm_head.vocab_size),
    ),
}


def checked(placed: Placed, block: Block) -> Block:
    """Return `block`, which `placed.backend` has built, as one that checks its results.

    Raises `Lfm2kitError` if it cannot be called as its spec says, or lacks `new_state`.  Blocks of
    specs that a plugin defines are returned as they are.
    """
    if type(placed.spec) not in RETURNED:
        return block
    _check_call(placed, "", block, ARGUMENTS[type(placed.spec)])
    if placed.spec.has_state:
        if not isinstance(block, Operator):
            raise Lfm2kitError(f"{said_of(placed)} has no method new_state(room)")
        _check_call(placed, "new_state", block.new_state, 1)
    return Checked(placed, block)


def said_of(placed: Placed) -> str:
    """Return how an error names a block: its place, spec and backend."""
    kind = type(placed.spec).__name__
    return f"{placed.name or 'the model'}: the {kind} block of backend '{placed.backend}'"


class Checked:
    """A block of a backend that raises `Lfm2kitError` where its result is not as its spec says."""

    def __init__(self, placed: Placed, block: Block) -> None:
        self._placed = placed
        self._spec = placed.spec
        self._block = block
        self._returned = RETURNED[type(placed.spec)]
        self._seen: set[int] = set()  # numbers of rows whose results were right
        if isinstance(block, Operator):
            self.new_state = block.new_state
        if isinstance(block, CallsNatively):  # its results' shapes are the caller's
            self.native = block.native

    def __call__(self, *inputs: Any) -> Any:
        result = self._block(*inputs)
        rows = inputs[0].shape[0] if hasattr(inputs[0], "shape") else -1  # -1: a batch
        if rows not in self._seen:
            self._check(result, inputs)
            if rows >= 0 and not isinstance(self._spec, specs.LastRows) and len(self._seen) < MOST:
                self._seen.add(rows)
        return result

    def _check(self, result: Any, inputs: tuple[Any, ...]) -> None:
        expected = self._returned(self._spec, *inputs)
        if _shapes(result) != expected:
            raise Lfm2kitError(
                f"{said_of(self._placed)} returned {_in_words(result)}, "
                f"but must return {_arrays(expected)}"
            )


def _shapes(result: Any) -> tuple[Any, ...]:
    if isinstance(result, tuple):
        return tuple(getattr(array, "shape", None) for array in result)
    return (getattr(result, "shape", None),)


def _in_words(result: Any) -> str:
    results = result if isinstance(result, tuple) else (result,)
    if all(hasattr(array, "shape") for array in results):
        return _arrays(_shapes(result))
    kinds = ("None" if one is None else type(one).__name__ for one in results)
    return ", ".join(kinds)


def _arrays(shapes: Shapes) -> str:
    many = "an array" if len(shapes) == 1 else f"{len(shapes)} arrays"
    texts = [f"[{', '.join(map(str, shape))}]" for shape in shapes]
    return f"{many} {' and '.join(texts)}".rstrip()


def _check_call(placed: Placed, method: str, call: Any, count: int) -> None:
    """Raise `Lfm2kitError` if `call`, a block or its method, does not take `count` arguments."""
    try:
        inspect.signature(call).bind(*[None] * count)
    except ValueError:
        return  # it is not written in Python, and does not say
    except TypeError as error:
        called = f"{method}(room)" if method else f"its {count} arguments"
        raise Lfm2kitError(
            f"{said_of(placed)} cannot be called with {called}, as its contract says: {error}"
        ) from None
