"""Checks what a backend builds, so that its mistake is named and harms no other block.

A block is looked at when it is built, and its results at each call that is not a replay: a kernel
that is given too few rows, or rows of a shorter type, would read beyond them.  A forward may be as
short as a third of a millisecond, so a right result must be recognised at once; `inspecting` looks
at all that takes longer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from reprlib import repr as brief  # of what a backend returned, however long it is
from typing import Any

import numpy as np

from lfm2kit import specs
from lfm2kit.backend import Block, CallsNatively, Fills, Operator, TellsParts
from lfm2kit.building.placement import Placed
from lfm2kit.errors import Lfm2kitError
from lfm2kit.pending import Begins, Pending
from lfm2kit.rewrites.parted_experts import SplitExperts, StreamedExperts
from lfm2kit.specs import Shape, Spec

FLOAT, INT = np.dtype(np.float32), np.dtype(np.int32)

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
    SplitExperts: 3,
    StreamedExperts: 3,
    specs.SparseMoe: 1,
    specs.LastRows: 3,
    specs.LMHead: 1,
    specs.Layer: 4,
    specs.Model: 2,
}


@dataclass(frozen=True, slots=True)
class Returned:
    """What a block returns: an array, or two, of the shape that follows from its arguments."""

    shape: Callable[..., Shape]  # of the spec and the arguments
    dtypes: tuple[np.dtype[Any], ...] = (FLOAT,)


# What a block returns, by its spec's type.
RETURNED: Mapping[type[Spec], Returned] = {
    specs.Embedding: Returned(lambda spec, batch: (batch.tokens, spec.hidden_size)),
    specs.RMSNorm: Returned(lambda spec, hidden, delta: hidden.shape, (FLOAT, FLOAT)),
    specs.ShortConv: Returned(lambda spec, x, batch, state: x.shape),
    specs.Attention: Returned(lambda spec, x, batch, state: x.shape),
    specs.MLP: Returned(lambda spec, x: x.shape),
    specs.Scores: Returned(lambda spec, x: (x.shape[0], spec.num_experts)),
    specs.Choice: Returned(
        lambda spec, scores: (scores.shape[0], spec.num_experts_per_tok), (INT, FLOAT)
    ),
    specs.Router: Returned(lambda spec, x: (x.shape[0], spec.num_experts_per_tok), (INT, FLOAT)),
    specs.Experts: Returned(lambda spec, x, ids, weights: x.shape),
    SplitExperts: Returned(lambda spec, x, ids, weights: x.shape),
    StreamedExperts: Returned(lambda spec, x, ids, weights: x.shape),
    specs.SparseMoe: Returned(lambda spec, x: x.shape),
    specs.LastRows: Returned(
        lambda spec, hidden, delta, batch: (batch.logits_rows.shape[0], spec.hidden_size),
        (FLOAT, FLOAT),
    ),
    specs.LMHead: Returned(lambda spec, x: (x.shape[0], spec.vocab_size)),
    specs.Layer: Returned(lambda spec, hidden, delta, batch, state: hidden.shape, (FLOAT, FLOAT)),
    specs.Model: Returned(
        lambda spec, batch, state: (batch.logits_rows.shape[0], spec.lm_head.vocab_size)
    ),
}


def checked(placed: Placed, block: Block, distribution: str = "") -> Block:
    """Return `block`, which `placed.backend` has built, as one that checks its results.

    `distribution` is where the backend comes from, for errors.  Raise `Lfm2kitError` if the block
    cannot be called as its spec says, or lacks `new_state`.  Blocks of specs that a plugin defines
    are returned as they are.
    """
    if type(placed.spec) not in RETURNED:
        return block
    who = said_of(placed, distribution)
    _check_call(who, "", block, ARGUMENTS[type(placed.spec)])
    if placed.spec.has_state:
        if not isinstance(block, Operator):
            raise Lfm2kitError(f"{who} has no method new_state(room)")
        _check_call(who, "new_state", block.new_state, 1)
    has_two = len(RETURNED[type(placed.spec)].dtypes) == 2
    return CheckedPair(placed, block, who) if has_two else CheckedArray(placed, block, who)


def check_replay(backend: object, replay: Any) -> None:
    """Raise `Lfm2kitError` if what a backend's `capture` returned is not a `Replay`."""
    has_methods = callable(replay) and callable(getattr(replay, "close", None))
    if not has_methods or not isinstance(getattr(replay, "nbytes", None), int | np.integer):
        raise Lfm2kitError(
            f"capture of {type(backend).__name__} returned {brief(replay)}, but must return a "
            "Replay: a function with nbytes and close()"
        )


def said_of(placed: Placed, distribution: str = "") -> str:
    """Return how an error names a block: its place, spec and backend."""
    kind, of = type(placed.spec).__name__, f" of {distribution}" if distribution else ""
    return f"{placed.name or 'the model'}: the {kind} block of backend '{placed.backend}'{of}"


class Checked:
    """A block of a backend that raises `Lfm2kitError` where its result is not as its spec says."""

    def __init__(self, placed: Placed, block: Block, who: str) -> None:
        self.placed = placed
        self.who = who  # an error's subject
        self._spec = placed.spec
        self._block = block
        returned = RETURNED[type(placed.spec)]
        self._shape, self._dtypes = returned.shape, returned.dtypes
        self._dtype = returned.dtypes[0]  # of the first array; a second one is of floats
        if isinstance(block, Operator):
            self.new_state = block.new_state
        if isinstance(block, CallsNatively):  # its results' shapes are the caller's
            self.native = block.native
        if isinstance(block, Fills):
            self._fill = block.fill
            self.fill = self._filled
        if isinstance(block, Begins):
            self.begin = self._begin
        if isinstance(block, TellsParts):
            self.tell_parts = block.tell_parts

    @contextmanager
    def called_through(self, around: Callable[[Checked, Block], Block]) -> Iterator[None]:
        """Let each call pass through `around(self, block)` until the context is left.

        So do calls of `fill`, if what `around` returns has it.
        """
        block, self._block = self._block, around(self, self._block)
        if isinstance(block, Fills):
            self._fill = getattr(self._block, "fill", block.fill)
        try:
            yield
        finally:
            self._block = block
            if isinstance(block, Fills):
                self._fill = block.fill

    def _filled(self, results: Sequence[Any], *inputs: Any) -> None:
        self._fill(results, *inputs)

    def forms(self, *inputs: Any) -> tuple[tuple[Shape, np.dtype[Any]], ...]:
        """Return the shape and the type of each array that a call with these inputs returns."""
        shape = self._shape(self._spec, *inputs)
        return tuple((shape, dtype) for dtype in self._dtypes)

    def check(self, result: Any, *inputs: Any) -> None:
        """Raise `Lfm2kitError` unless `result` is as it must be after a call with `inputs`."""
        self._check(result, self._shape(self._spec, *inputs))

    def _begin(self, *inputs: Any) -> Pending:
        pending = self._block.begin(*inputs)  # type: ignore[attr-defined]
        return Ending(pending, partial(self._returned, shape=self._shape(self._spec, *inputs)))

    def _returned(self, result: Any, shape: Shape) -> Any:
        self._check(result, shape)
        return result

    def _check(self, result: Any, shape: Shape) -> None:
        """Raise `Lfm2kitError` unless `result` is as it must be.

        The type of arrays of another library, as a backend may have in its own memory, is judged
        only where it is one of NumPy's.
        """
        arrays = result if isinstance(result, tuple) else (result,)
        shapes = (shape,) * len(self._dtypes)
        if tuple(getattr(array, "shape", None) for array in arrays) != shapes:
            returned, expected = _in_words(arrays), _arrays(shapes)
        elif not all(map(_may_be, arrays, self._dtypes)):
            types = [getattr(array, "dtype", "another type") for array in arrays]
            returned = _arrays(shapes, types)
            expected = _arrays(shapes, self._dtypes)
        else:
            return
        raise Lfm2kitError(f"{self.who} returned {returned}, but must return {expected}")


@dataclass(frozen=True, slots=True)
class Ending:
    """A call of a block that has begun; its result goes through `look` when it has ended."""

    pending: Pending
    look: Callable[[Any], Any]

    def end(self) -> Any:
        return self.look(self.pending.end())


class CheckedArray(Checked):
    def __call__(self, *inputs: Any) -> Any:
        array = self._block(*inputs)
        shape = self._shape(self._spec, *inputs)
        try:
            if array.shape == shape and array.dtype is self._dtype:
                return array
        except AttributeError:
            pass
        self._check(array, shape)
        return array


class CheckedPair(Checked):
    def __call__(self, *inputs: Any) -> Any:
        result = self._block(*inputs)
        shape = self._shape(self._spec, *inputs)
        try:
            first, second = result
            if (
                first.shape == second.shape == shape
                and first.dtype is self._dtype
                and second.dtype is FLOAT
                and type(result) is tuple
            ):
                return result
        except (AttributeError, TypeError, ValueError):
            pass
        self._check(result, shape)
        return result


def _may_be(array: Any, dtype: np.dtype[Any]) -> bool:
    """Return whether an array has this type, or one that NumPy does not know."""
    its = getattr(array, "dtype", None)
    return not isinstance(its, np.dtype) or its == dtype


def _in_words(results: tuple[Any, ...]) -> str:
    if all(hasattr(array, "shape") for array in results):
        return _arrays(tuple(array.shape for array in results))
    kinds = ("None" if one is None else type(one).__name__ for one in results)
    return ", ".join(kinds)


def _arrays(shapes: tuple[Any, ...], dtypes: Sequence[Any] = ()) -> str:
    many = "an array" if len(shapes) == 1 else f"{len(shapes)} arrays"
    texts = [f"[{', '.join(map(str, shape))}]" for shape in shapes]
    if dtypes:
        texts = [f"{text} of {dtype}" for text, dtype in zip(texts, dtypes, strict=True)]
    return f"{many} {' and '.join(texts)}".rstrip()


def _check_call(who: str, method: str, call: Any, count: int) -> None:
    """Raise `Lfm2kitError` if `call`, a block or its method, does not take `count` arguments."""
    try:
        inspect.signature(call).bind(*[None] * count)
    except ValueError:
        return  # it is not written in Python, and does not say
    except TypeError as error:
        called = f"{method}(room)" if method else f"its {count} arguments"
        raise Lfm2kitError(
            f"{who} cannot be called with {called}, as its contract says: {error}"
        ) from None
