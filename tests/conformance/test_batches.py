"""Arbitrary batches, right and wrong in every field, before every backend that can run here.

A right one gives the reference's logits, a wrong one a ValueError of one sentence; what is right
is said here once more, in plain Python.  LFM2KIT_BATCHES=10000 tries as many instead of 100.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lfm2kit.backend import Backend, Context
from lfm2kit.batch import Batch
from lfm2kit.building.plugins import installed_plugins
from lfm2kit.model import LFM2
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.state import STEP_BACK, ModelState, Room
from lfm2kit.testing import random_weights
from lfm2kit.testing.tiny_model import build_tiny_model
from tests.conformance.installed import item_of
from tests.core.small import small_spec

BATCHES = os.environ.get("LFM2KIT_BATCHES")
VOCABULARY = 50
ROOM = Room(6, 64)
SEQUENCES = 3  # with two pages each, which they have seen
# All experts are taken: no two results differ by a choice that was within rounding.
SPEC = small_spec(
    layer_types=["conv", "full_attention"], num_hidden_layers=2, num_dense_layers=1,
    num_experts=3, vocab_size=VOCABULARY,
)  # fmt: skip
PLUGINS = installed_plugins()
BACKENDS = [  # whose logits are those of the reference
    name for name, b in PLUGINS.backends.items() if b.why_not is None and name == item_of(name, b)
]
INTEGERS = ("max_seqlen",)
ARRAYS = ("token_ids", "positions", "cu_seqlens", "pages", "logits_rows")
Fields = dict[str, Any]

pytestmark = [pytest.mark.gpu] if "cuda" in BACKENDS else []


@cache
def models() -> dict[str, LFM2]:
    """Return a model for each backend, with its blocks wherever it has them."""
    create = PLUGINS.creator(Context())
    return {name: built(create(name)) for name in BACKENDS}


def built(backend: Backend) -> LFM2:
    return build_tiny_model(SPEC, random_weights(SPEC, 0), ReferenceBackend(), backend)


@dataclass(frozen=True)
class Case:
    """A batch's fields, what each sequence's pages hold (None: no state), and the state's flaw.

    Sequence i has the pages 2i and 2i + 1.
    """

    fields: Fields
    seen: tuple[int, ...] | None
    flaw: str  # "", "of another model" or "a layer short"

    def is_right(self) -> bool:
        return is_batch(self.fields) and not self.flaw and fits(self.fields, self.seen)


def is_batch(fields: Fields) -> bool:
    arrays = [fields[name] for name in ARRAYS]
    if not all(isinstance(a, np.ndarray) and a.dtype == np.int32 for a in arrays):
        return False
    if not all(a.flags.c_contiguous for a in arrays):
        return False
    if [a.ndim for a in arrays] != [1, 1, 1, 2, 1]:
        return False
    ids, positions, ends, pages, rows = (array.tolist() for array in arrays)
    if len(ends) != len(pages) + 1 or len(positions) != len(ids):
        return False
    if ends[0] != 0 or ends[-1] != len(ids) or any(b <= a for a, b in pairwise(ends)):
        return False
    parts = [positions[a:b] for a, b in pairwise(ends)]
    if any(part != list(range(part[0], part[0] + len(part))) for part in parts):
        return False
    return (
        all(0 <= position < 2**24 for position in positions)
        and all(page >= -1 for row in pages for page in row)
        and all(row == [p for p in row if p >= 0] + [-1] * row.count(-1) for row in pages)
        and all(0 <= row < len(ids) for row in rows)
        and all(type(fields[name]) is int for name in INTEGERS)
        and fields["max_seqlen"] == max(map(len, parts), default=0)
    )


def fits(fields: Fields, seen: tuple[int, ...] | None) -> bool:
    if not all(0 <= token < VOCABULARY for token in fields["token_ids"]):
        return False
    starts = [int(fields["positions"][first]) for first in fields["cu_seqlens"][:-1]]
    if seen is None:
        return not any(starts)
    lengths = np.diff(fields["cu_seqlens"]).tolist()
    tables = fields["pages"].tolist()
    everywhere = [page for table in tables for page in table if page >= 0]
    if any(page >= ROOM.pages for page in everywhere):
        return False
    for table, start, length in zip(tables, starts, lengths, strict=True):
        columns = range(start // 64, (start + length - 1) // 64 + 1)
        if columns.stop > sum(page >= 0 for page in table):
            return False
        if any(everywhere.count(table[column]) > 1 for column in columns):
            return False
        if start and not goes_on(table, start, seen):
            return False
    return True


def goes_on(table: list[int], start: int, seen: tuple[int, ...]) -> bool:
    """Return whether the pages before `start` are those of one sequence that holds so much."""
    owner = table[0] // 2
    used = (start - 1) // 64 + 1
    if table[:used] != [2 * owner, 2 * owner + 1][:used] or seen[owner] < start:
        return False
    held = min(seen[owner], 64 * used)  # of the page that is written, or the one before
    return start >= held - STEP_BACK


def edited(draw: st.DrawFn, array: Any) -> Any:
    """Draw an array with one thing changed: a number, its length, its type or its form."""
    number = draw(st.integers(-3, 60) | st.integers(-(2**31), 2**31 - 1))
    flat = array.reshape(-1)
    at = draw(st.integers(0, max(0, len(flat) - 1)))
    edits: dict[str, Callable[[], Any]] = {
        "another number": lambda: np.where(np.arange(flat.size) == at, number, flat),
        "a number more": lambda: np.append(array, array[:1] if array.ndim > 1 else number),
        "a number less": lambda: array[1:],
        "all shifted": lambda: array + np.int32(number % 7 - 3),
        "in another order": lambda: array[::-1],
    }
    forms: dict[str, Callable[[], Any]] = {
        "a list": array.tolist,
        "more dimensions": lambda: array[None],
        "every second": lambda: np.repeat(array, 2, axis=-1)[..., ::2],
        "none": lambda: None,
    }
    types = ("int64", "uint32", "int16", "float32", "bool", ">i4")
    what = draw(st.sampled_from([*edits, *forms, *types]))
    if what in edits:
        changed = np.ascontiguousarray(edits[what](), np.int32)
        has_shape = changed.size % max(1, array[0].size if len(array) else 1) == 0
        return changed.reshape(-1, *array.shape[1:]) if has_shape and array.size else changed
    return forms[what]() if what in forms else array.astype(what)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    has_state = draw(st.booleans())
    tokens = st.integers(0, 5) | st.integers(60, 70) | st.integers(120, 124)
    seen = tuple(draw(st.lists(tokens, min_size=SEQUENCES, max_size=SEQUENCES)))
    chosen = draw(st.permutations(range(SEQUENCES)))[: draw(st.integers(0, SEQUENCES))]
    lengths = [draw(st.integers(1, 5) | st.integers(60, 70)) for _ in chosen]
    back = [draw(st.sampled_from([0, 0, 1, 3, STEP_BACK, STEP_BACK + 1])) for _ in chosen]
    starts = [
        max(0, min(seen[i], 128 - n) - b) * draw(st.booleans()) if has_state else 0
        for i, n, b in zip(chosen, lengths, back, strict=True)
    ]
    sequences = [
        draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=n, max_size=n)) for n in lengths
    ]
    pages = [[2 * i, 2 * i + 1] for i in chosen] if has_state else None
    batch = Batch.of_sequences(sequences, starts=starts, pages=pages)
    fields = {name: getattr(batch, name) for name in (*ARRAYS, *INTEGERS)}
    rows = st.lists(st.integers(0, max(0, batch.tokens - 1)), max_size=5)
    fields["logits_rows"] = np.array(draw(rows) if batch.tokens else [], np.int32)
    for name in draw(st.lists(st.sampled_from([*ARRAYS, *INTEGERS]), max_size=2)):
        if name in INTEGERS:
            fields[name] = draw(st.sampled_from([0, 1, 2, 9, -1, 2**40, 2.0, None, np.int32(2)]))
        elif isinstance(fields[name], np.ndarray):
            fields[name] = edited(draw, fields[name])
    flaws = st.sampled_from(["", "", "", "", "of another model", "a layer short"])
    return Case(fields, seen if has_state else None, draw(flaws) if has_state else "")


def state_of(model: LFM2, case: Case) -> ModelState | None:
    """Return a state whose sequences have seen as many tokens as the case says."""
    if case.seen is None:
        return None
    state = model.new_state(ROOM)
    there = [i for i, count in enumerate(case.seen) if count]
    prompts = [(np.arange(case.seen[i]) + i) % VOCABULARY for i in there]
    pages = [[2 * i, 2 * i + 1] for i in there]
    model.logits(Batch.of_sequences(prompts, pages=pages), state)
    if case.flaw == "of another model":
        return built(ReferenceBackend()).new_state(ROOM)
    if case.flaw == "a layer short":
        state.layers.pop()
    return state


def outcome(model: LFM2, case: Case) -> Any:
    """Return the logits, or the sentence of a ValueError; any other error is a fault."""
    state = state_of(model, case)
    try:
        return model.logits(Batch(**case.fields), state).copy()
    except ValueError as error:
        return str(error)


@settings(
    max_examples=int(BATCHES or 100),
    derandomize=BATCHES is None,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(cases())
def test_a_batch_is_right_or_refused(case: Case) -> None:
    want = outcome(models()["reference"], case)
    assert isinstance(want, str) != case.is_right(), want
    for name, model in models().items():
        got = outcome(model, case)
        if isinstance(want, str):
            assert got == want, name
            assert want.strip(), "an empty sentence"
            assert "\n" not in want
        else:
            assert isinstance(got, np.ndarray), (name, got)
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_refused_batch_changes_nothing(name: str) -> None:
    model = models()[name]
    whole = model.logits(Batch.of_sequences([[1, 2, 3, 4]])).copy()
    state = model.new_state(ROOM)
    model.logits(Batch.of_sequences([[1, 2]], pages=[[3]]), state)
    for start, page in ((3, 3), (2, 2), (2, ROOM.pages)):
        with pytest.raises(ValueError, match="page"):
            model.logits(Batch.of_sequences([[9, 9]], starts=[start], pages=[[page]]), state)
    with pytest.raises(ValueError, match="no state"):
        model.logits(Batch.of_sequences([[9, 9, 9, 9]], starts=[1]))
    got = model.logits(Batch.of_sequences([[3, 4]], starts=[2], pages=[[3]]), state)
    np.testing.assert_allclose(got, whole, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(model.logits(Batch.of_sequences([[1, 2, 3, 4]])), whole)
