"""Asks backends what the core wants to know before it builds, and names one that answers nonsense.

A backend that raises, or returns something else than its contract says, becomes one line with its
name, the method, the spec that it was asked about and what it returned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import inf
from reprlib import repr as brief  # of what a backend returns, however long it is
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lfm2kit.backend import (
    Backend,
    Bounded,
    Ceilings,
    PreventsCapture,
    ReadsRows,
    Room,
    TakesPadding,
    Weights,
)
from lfm2kit.errors import Lfm2kitError
from lfm2kit.formats import F32, PLAIN, Format
from lfm2kit.memory import Memory
from lfm2kit.plugin_faults import blaming
from lfm2kit.specs import Spec

if TYPE_CHECKING:
    from lfm2kit.building.placement import Placed

Holds = Callable[[Any], bool]
A_SIZE = "a whole number (int) of 0 or more"


class Answers(NamedTuple):
    """The answers of one backend; each of them raises `Lfm2kitError` if it breaks the contract."""

    backend: Backend
    item: str  # the backend's, in the plan
    place: str = ""  # of the block that it is asked about: "layers.2.feed_forward"

    def why_unsupported(self, spec: Spec) -> str | None:
        answer: str | None = self._of(spec, "why_unsupported", _is_reason, "a text or None", spec)
        return answer

    def why_not_around(self, spec: Spec, parts: Sequence[str]) -> str | None:
        answer: str | None = self._of(
            spec, "why_not_around", _is_reason, "a text or None", spec, parts
        )
        return answer

    def why_not_crossed(self, spec: Spec, memory: Memory, outer: Memory) -> str | None:
        answer: str | None = self._of(
            spec, "why_not_crossed", _is_reason, "a text or None", spec, memory, outer
        )
        return answer

    def why_not_captured(self, spec: Spec) -> str | None:
        """Return None if the backend does not say."""
        if not isinstance(self.backend, PreventsCapture):
            return None
        answer: str | None = self._of(spec, "why_not_captured", _is_reason, "a text or None", spec)
        return answer

    def memory(self, spec: Spec) -> Memory:
        answer: Memory = self._of(spec, "memory", _is_memory, "a Memory", spec)
        return answer

    def kept_bytes(self, spec: Spec, weights: Weights) -> int:
        return self._bytes(spec, "kept_bytes", spec, weights)

    def scratch_bytes(self, spec: Spec, tokens: int) -> int:
        return self._bytes(spec, "scratch_bytes", spec, tokens)

    def state_bytes(self, spec: Spec, room: Room) -> int:
        return self._bytes(spec, "state_bytes", spec, room)

    def pinned_bytes(self, spec: Spec, weights: Weights) -> int:
        return self._bytes(spec, "pinned_bytes", spec, weights)

    def kept_formats(self, spec: Spec, weights: Weights) -> Mapping[str, Format]:
        there = spec.parameters()

        def are_formats(answer: Any) -> bool:
            return isinstance(answer, Mapping) and all(
                name in there and isinstance(kept, Format) for name, kept in answer.items()
            )

        words = f"a mapping of {', '.join(there) or 'nothing'} to Formats"
        answer: Mapping[str, Format] = self._of(
            spec, "kept_formats", are_formats, words, spec, weights
        )
        return answer

    def row_format(self, spec: Spec) -> Format:
        """Return F32 if the backend does not say."""
        if not isinstance(self.backend, ReadsRows):
            return F32
        words = "F32, BF16 or F16"
        answer: Format = self._of(spec, "row_format", lambda one: one in PLAIN, words, spec)
        return answer

    def takes_padding(self, spec: Spec) -> bool:
        """Return False if the backend does not say."""
        if not isinstance(self.backend, TakesPadding):
            return False
        answer: bool = self._of(spec, "takes_padding", _is_bool, "True or False", spec)
        return answer

    def notes(self) -> Sequence[str]:
        answer: Sequence[str] = self._of(None, "notes", _are_texts, "a list of texts")
        return answer

    def ceilings(self) -> Ceilings:
        answer: Ceilings = self._of(
            None, "ceilings", _are_ceilings, "Ceilings of two finite numbers above 0"
        )
        return answer

    def hardware(self) -> Mapping[str, str]:
        answer: Mapping[str, str] = self._of(
            None, "hardware", _maps_texts, "a mapping of texts to texts"
        )
        return answer

    def _bytes(self, spec: Spec, method: str, *arguments: Any) -> int:
        return int(self._of(spec, method, _is_size, A_SIZE, *arguments))

    def _of(self, spec: Spec | None, method: str, holds: Holds, words: str, *arguments: Any) -> Any:
        what = "" if spec is None else f" for {self.place or 'a block'}, a {type(spec).__name__}"
        who = f"{method} of backend '{self.item}'"
        with blaming(f"{who}, asked{what}," if what else who):
            answer = getattr(self.backend, method)(*arguments)
            is_right = holds(answer)
        if not is_right:
            raise Lfm2kitError(f"{who} returned {came(answer)}{what}, but must return {words}")
        return answer


def came(answer: Any) -> str:
    """Return a value with its type, in words: "0.5 (float)"."""
    return "None" if answer is None else f"{brief(answer)} ({type(answer).__name__})"


def free_bytes_of(memory: Bounded) -> int:
    """Return the free bytes of a memory; `Lfm2kitError` if that raises, or returns no size."""
    return _size(f"free_bytes of memory '{memory.name}'", memory.free_bytes)


def exchange_bytes_of(placed: Placed, tokens: int) -> int:
    """Return the bytes that a joined block's exchange takes; 0 for a block that is not joined.

    Raise `Lfm2kitError` if the join raises, or returns no size.
    """
    join = placed.join
    if join is None:
        return 0
    who = f"exchange_bytes of the join of {placed.name or 'the model'}"
    return _size(who, lambda: join.exchange_bytes(placed.spec, tokens))


def _size(who: str, ask: Callable[[], Any]) -> int:
    with blaming(who):
        answer = ask()
    if not _is_size(answer):
        raise Lfm2kitError(f"{who} returned {came(answer)}, but must return {A_SIZE}")
    return int(answer)


def _is_reason(answer: Any) -> bool:
    return answer is None or isinstance(answer, str)


def _is_bool(answer: Any) -> bool:
    return isinstance(answer, bool)


def _is_memory(answer: Any) -> bool:
    is_named = isinstance(getattr(answer, "name", None), str)
    return is_named and all(callable(getattr(answer, m, None)) for m in ("from_host", "to_host"))


def _is_size(answer: Any) -> bool:
    is_whole = isinstance(answer, int | np.integer) and not isinstance(answer, bool)
    return is_whole and bool(answer >= 0)


def _are_texts(answer: Any) -> bool:
    return isinstance(answer, list | tuple) and all(isinstance(one, str) for one in answer)


def _maps_texts(answer: Any) -> bool:
    return isinstance(answer, Mapping) and all(
        isinstance(text, str) for both in answer.items() for text in both
    )


def _are_ceilings(answer: Any) -> bool:
    numbers = (int, float, np.number)
    return isinstance(answer, Ceilings) and all(
        isinstance(one, numbers) and not isinstance(one, bool) and 0 < one < inf for one in answer
    )
