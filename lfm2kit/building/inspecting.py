"""Looks at what each block returns in every respect, once, in a forward of its own.

At every call the core looks at shapes and types alone, because that takes no time (`results`).  An
array of another library, one with gaps, or a NaN shows later, in another block or in the logits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from lfm2kit import specs
from lfm2kit.backend import Begins, Block, Pending
from lfm2kit.batch import Batch
from lfm2kit.building import out_of_memory
from lfm2kit.building.results import Checked, Ending
from lfm2kit.errors import Lfm2kitError
from lfm2kit.memory import HOST, Array, Memory
from lfm2kit.plugin_faults import name_of
from lfm2kit.progress import allow_forward
from lfm2kit.specs import Shape
from lfm2kit.weights import Weights

if TYPE_CHECKING:
    from lfm2kit.model import LFM2

LENGTHS = (9, 1, 7)  # of the sequences: more rows than a small tile has
ORDINALS = ("first ", "second ")
MAY_RETURN_HIDDEN = (specs.RMSNorm, specs.Layer)  # the one argument that may be a result


@np.errstate(all="ignore")  # what is not finite is found here
def fault_in_a_forward(
    model: LFM2, blocks: Iterable[Checked], weights: Weights, ranks: int = 1
) -> str | None:
    """Return the first fault in a result of these blocks of the model, in a forward of its own.

    It is a sentence with the block's name, or None.  `weights` are the whole model's.  Each of the
    `ranks` that exchange tokens calls this; a fault on one of them keeps no other one waiting.
    """
    ids = np.linspace(0, model.spec.embed_tokens.vocab_size - 1, sum(LENGTHS)).astype(np.int32)
    batch = Batch.of_sequences(np.split(ids, np.cumsum(LENGTHS)[:-1]))
    allow_forward(model.placed.leaves(), batch, ranks)
    with (
        out_of_memory.in_a_forward(model.forward, batch),
        inspected(blocks, weights) as faults,
        model.overlap.put_off(),
        model.running(batch.tokens),
    ):
        model.home.to_host(model.forward(batch.on(model.home), None))
    return faults[0] if faults else None


@contextmanager
def inspected(blocks: Iterable[Checked], weights: Weights) -> Iterator[list[str]]:
    """Look at the results of these blocks until the context is left; give the faults.

    A result that other blocks cannot work with is replaced, so that a forward comes to its end.
    """
    faults: list[str] = []
    with ExitStack() as calls:
        for block in blocks:
            calls.enter_context(block.called_through(partial(_Inspected, weights, faults)))
        yield faults


class _Inspected:
    """A backend's block whose results are looked at."""

    def __init__(self, weights: Weights, faults: list[str], checked: Checked, block: Block) -> None:
        self._weights = weights.scope(checked.placed.scope)
        self._faults = faults
        self._checked = checked
        self._block = block
        self._spec, self._memory = checked.placed.spec, checked.placed.memory
        if isinstance(block, Begins):
            self.begin = self._begin

    def __call__(self, *inputs: Any) -> Any:
        are_finite = self._are_finite(inputs)  # before the call: a norm adds in place
        return self._seen(self._block(*inputs), inputs, are_finite)

    def _begin(self, *inputs: Any) -> Pending:
        pending = self._block.begin(*inputs)  # type: ignore[attr-defined]
        seen = partial(self._seen, inputs=inputs, are_finite=self._are_finite(inputs))
        return Ending(pending, seen)

    def _seen(self, result: Any, inputs: Sequence[Any], are_finite: bool) -> Any:
        """Return the result, or one that other blocks can work with, and note what is wrong."""
        try:
            self._checked.check(result, *inputs)
            self._check_arrays(result, inputs)
        except Lfm2kitError as fault:
            self._faults.append(str(fault))
            return self._stand_in(inputs)
        if are_finite:
            self._note_not_finite(result)
        return result

    def _check_arrays(self, result: Any, inputs: Sequence[Any]) -> None:
        """Raise `Lfm2kitError` for an array that is not the caller's own, in the usual order."""
        forms = self._checked.forms(*inputs)
        for i, (array, form) in enumerate(zip(_each(result), forms, strict=True)):
            may_return = i == 0 and isinstance(self._spec, MAY_RETURN_HIDDEN)
            others = inputs[1:] if may_return else inputs
            wrong = _wrong_kind(array, *form, self._memory) or _wrong_order(array)
            if wrong is None and self._memory.name == HOST.name:
                wrong = _not_own(array, others, len(inputs) - len(others))
            if wrong is not None:
                raise Lfm2kitError(self._said(i, result, wrong))

    def _note_not_finite(self, result: Any) -> None:
        for i, array in enumerate(_each(result)):
            wrong = _not_finite(self._memory.to_host(array))
            if wrong is not None and _weights_are_finite(self._weights, self._spec):
                finite = "though its arguments and weights are finite"
                self._faults.append(self._said(i, result, f"{wrong}, {finite}"))
                return

    def _said(self, i: int, result: Any, wrong: str) -> str:
        which = ORDINALS[i] if isinstance(result, tuple) else ""
        return f"{self._checked.who} returned a {which}result that {wrong}"

    def _are_finite(self, inputs: Sequence[Any]) -> bool:
        count = len(inputs) - self._spec.has_state  # a state is whatever the block has made
        arrays = (one for one in inputs[:count] if one is not None and not isinstance(one, Batch))
        return all(_not_finite(self._memory.to_host(array)) is None for array in arrays)

    def _stand_in(self, inputs: Sequence[Any]) -> Any:
        """Return what a call with these inputs might return: zeros, or expert ids."""
        forms = self._checked.forms(*inputs)
        arrays = tuple(self._memory.from_host(_any_of(*form)) for form in forms)
        return arrays if len(arrays) > 1 else arrays[0]


def _wrong_kind(array: Array, shape: Shape, dtype: np.dtype[Any], memory: Memory) -> str | None:
    """Return why `array` is not its memory's, or not of this shape and type; None if it is."""
    is_host = memory.name == HOST.name
    kind = np.ndarray if is_host else type(memory.from_host(_any_of(shape, dtype)))
    is_one = type(array) is kind if is_host else isinstance(array, kind)
    if not is_one:
        there = f"arrays of memory '{memory.name}' are {name_of(kind)}"
        return f"is a {name_of(type(array))}, but {there}"
    host = memory.to_host(array)
    if (host.shape, host.dtype) != (shape, dtype):
        got, want = f"{host.dtype} {list(host.shape)}", f"{dtype} {list(shape)}"
        return f"is {got} on the host, but must be {want}"
    return None


def _wrong_order(array: Array) -> str | None:
    """Return why other blocks cannot read `array` as they must; None if nothing shows."""
    if getattr(getattr(array, "flags", None), "c_contiguous", True):
        return None
    return f"is not C-contiguous, but must be: its strides are {array.strides}"


def _not_own(array: Any, inputs: Sequence[Any], first: int) -> str | None:
    """Return why a host array is not the caller's to keep and to write; None if it is.

    The number of the first input is `first`.
    """
    if not array.flags.writeable:
        return "is read-only, but belongs to the caller, which may write to it"
    for i, other in enumerate(inputs, first):
        if isinstance(other, np.ndarray) and np.may_share_memory(array, other):
            return f"shares memory with argument {i}, but must be a new array"
    return None


def _not_finite(array: Any) -> str | None:
    """Return which value of a host array is not finite; None if all are, or if it has integers."""
    if array.dtype.kind != "f" or (finite := np.isfinite(array)).all():
        return None
    at = tuple(np.argwhere(~finite)[0].tolist())
    count = np.count_nonzero(~finite)
    return f"holds {array[at]} at {list(at)} ({count} of {array.size} values are not finite)"


def _weights_are_finite(weights: Weights, spec: specs.Spec) -> bool:
    """Return whether all weights are; the core has checked biases, which may be -inf."""
    names = (name for name in spec.parameters() if not name.endswith("expert_bias"))
    return all(np.isfinite(weights.float32(name)).all() for name in names)


def _any_of(shape: Shape, dtype: np.dtype[Any]) -> Any:
    """Return a host array of this form: zeros, or different expert ids in each row."""
    if dtype.kind == "f":
        return np.zeros(shape, dtype)
    return np.broadcast_to(np.arange(shape[-1], dtype=dtype), shape).copy()


def _each(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)
