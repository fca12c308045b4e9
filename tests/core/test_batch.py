"""A batch is checked where it is made; what is made of it is not checked again."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from lfm2kit import batch as module
from lfm2kit.batch import Batch, Form
from lfm2kit.batch_rules import ARRAYS, MOST_CONTEXT, check
from lfm2kit.memory import Memory
from lfm2kit.testing.device import DeviceMemory
from tests.core.test_model import Elsewhere


def int32(*values: int) -> Any:
    return np.array(values, np.int32)


def two_sequences(**changes: Any) -> Batch:
    """Return three rows from position 5 on in pages 2 and 1, and two from 0 on in page 0."""
    fields = {
        "token_ids": int32(1, 2, 3, 4, 5),
        "positions": int32(5, 6, 7, 0, 1),
        "cu_seqlens": int32(0, 3, 5),
        "pages": np.array([[2, 1], [0, -1]], np.int32),
        "logits_rows": int32(4, 2, 4),
        "max_seqlen": 3,
    }
    return Batch(**{**fields, **changes})


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("token_ids", [1, 2, 3, 4, 5], "token_ids is not a NumPy array of int32, but list"),
        ("token_ids", np.arange(5), "int64"),
        ("token_ids", np.ma.masked_less(int32(1, 2, 3, 4, 5), 2), "but masked"),
        ("pages", np.ma.masked_less(np.array([[1], [0]], np.int32), 1), "but masked"),
        ("pages", int32(1, 0), r"shape \(2,\) is not a contiguous table"),
        ("pages", np.zeros((2, 4), np.int32)[:, ::2], "not a contiguous table"),
        ("token_ids", np.arange(5, dtype=np.float32), "float32"),
        ("token_ids", int32(1, 2, 3, 4), "does not rise from 0 to the 4 tokens"),
        ("positions", int32(5, 6, 7, 0, 1)[None], r"shape \(1, 5\)"),
        ("positions", np.repeat(int32(5, 6, 7, 0, 1), 2)[::2], "contiguous"),
        ("positions", int32(5, 6, 7, 0), "4 positions for 5 tokens"),
        ("positions", int32(5, 7, 8, 0, 1), "not consecutive"),
        ("positions", int32(5, 6, 7, 1, 1), "not consecutive"),
        ("positions", int32(-1, 0, 1, 0, 1), "negative"),
        ("positions", int32(-(2**31), 6, 7, 0, 1), "negative"),
        ("positions", int32(5, 6, 7, 0, -1), "a padding row, at position -1, is not a sequence of"),
        ("positions", int32(5, 6, 7, -1, -1), "is not a sequence of its own without pages"),
        ("positions", MOST_CONTEXT - 2 + int32(0, 1, 2, 0, 1), "beyond 16777215"),
        ("positions", int32(2**31 - 2, 2**31 - 1, -(2**31), 0, 1), "negative, or beyond"),
        ("cu_seqlens", int32(0, 3, 4), "does not rise"),
        ("cu_seqlens", int32(1, 3, 5), "does not rise"),
        ("cu_seqlens", int32(0, 5, 5), "by at least one for each sequence"),
        ("cu_seqlens", int32(0, 6, 5), "does not rise"),
        ("cu_seqlens", int32(0, 5), "2 entries for 2 sequences"),
        ("pages", np.array([[2], [-2]], np.int32), "negative: -2"),
        ("pages", np.array([[2, 1], [-1, 1]], np.int32), "another page after a -1"),
        ("pages", np.array([[2]], np.int32), "3 entries for 1 sequences"),
        ("logits_rows", int32(5), "outside the batch's 5 rows"),
        ("logits_rows", int32(0, -1), "outside the batch's 5 rows"),
        ("max_seqlen", 2, "max_seqlen is 2, but must be the int 3"),
        ("max_seqlen", np.int64(3), "must be the int 3"),
        ("memory", None, "memory is None, but must be a lfm2kit Memory"),
        ("memory", "host", "memory is 'host', but must be"),
    ],
)
def test_a_wrong_field_is_an_error_of_one_sentence(field: str, value: Any, says: str) -> None:
    two_sequences()
    with pytest.raises(ValueError, match=says) as error:
        two_sequences(**{field: value})
    assert "\n" not in str(error.value)


def test_long_sequences_do_not_wrap_around() -> None:
    """Their lengths, counted in int32, would come to the right number of tokens."""
    step, count = 2**20, 2**12 + 1
    ends = (np.arange(count + 1) * step).astype(np.uint32).view(np.int32)
    rows = np.zeros(int(ends[-1]), np.int32)
    with pytest.raises(ValueError, match="does not rise"):
        Batch(rows, rows, ends, np.empty((count, 0), np.int32), rows[:0], step)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"sequences": [[]]}, "not a row of one or more"),
        ({"sequences": [[[1, 2]]]}, "not a row of one or more"),
        ({"sequences": [7]}, "not a row of one or more"),
        ({"sequences": [[1.0, 2.0]]}, "token ids are not integers, but float64"),
        ({"sequences": [["a"]]}, "not integers"),
        ({"sequences": [np.ma.masked_less([1, 2], 2)]}, "token ids are a masked array"),
        ({"sequences": [[1]], "pages": [np.ma.masked_less([1], 2)]}, "pages are a masked array"),
        ({"sequences": [[True]]}, "not integers, but bool"),
        ({"sequences": [[2**32 + 5]]}, "does not fit into int32"),
        ({"sequences": [np.array([2**40])]}, "does not fit into int32"),
        ({"sequences": [[1], [2]], "starts": [0]}, "starts has shape"),
        ({"sequences": [[1]], "starts": [-1000]}, "cannot start at -1000"),
        ({"sequences": [[1]], "starts": [0.5]}, "starts are not integers"),
        ({"sequences": [[1]], "starts": [10**9]}, "cannot start at 1000000000"),
        ({"sequences": [[1, 2]], "starts": [MOST_CONTEXT - 1]}, "cannot start"),
        ({"sequences": [[1], [2]], "pages": [[0]]}, "1 rows of pages for 2 sequences"),
        ({"sequences": [[1]], "pages": [[-2]]}, "negative: -2"),
        ({"sequences": [[1]], "pages": [[-1, 0]]}, "after a -1"),
        (
            {"sequences": [[1]], "pages": [0]},
            r"pages is \[0\], but must have a row",
        ),
        ({"sequences": [[1], [2]], "pages": [[4], 5]}, r"pages is \[\[4\], 5\], but must have"),
        ({"sequences": [[1]], "pages": 0}, r"pages is 0, but must .* as \[\[0\], \[1, 2\]\]"),
        ({"sequences": [[1]], "pages": np.int32(0)}, "must have a row of page numbers for each"),
        ({"sequences": [[1]], "pages": [[[0]]]}, "must have a row of page numbers for each"),
        ({"sequences": [[1]], "pages": [[[0], 1]]}, "pages are not a row of integers"),
        (
            {"sequences": [[[1], [2, 3]]]},
            r"not a row of integers: \[\[1\], \[2, 3\]\]",
        ),
        ({"sequences": 7}, "sequences is 7, but must be rows of token ids"),
        ({"sequences": [[1]], "starts": 0}, r"starts has shape \(\)"),
        ({"sequences": [[1]], "starts": [[0], [1, 2]]}, "starts are not a row of integers"),
        ({"sequences": [[1]], "pages": [[0.5]]}, "pages are not integers"),
    ],
)
def test_wrong_sequences_are_an_error_of_one_sentence(arguments: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        Batch.of_sequences(**arguments)
    assert "\n" not in str(error.value)


def test_sequences_of_any_integers_become_int32() -> None:
    batch = Batch.of_sequences([np.array([1, 2], np.uint64), [3], np.array([4], np.int16)])
    assert batch.token_ids.dtype == np.int32
    assert batch.token_ids.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("starts", [None, [0, 9, 2]])
@pytest.mark.parametrize("pages", [None, [[4], [0, 3], [2]]])
def test_what_is_made_of_sequences_keeps_the_rules(starts: Any, pages: Any) -> None:
    batch = Batch.of_sequences([[1, 2, 3], [4], [5, 6]], starts=starts, pages=pages)
    fields = {name: getattr(batch, name) for name in (*module.ARRAYS, "max_seqlen")}
    Batch(**fields)  # checks
    assert batch.starts.tolist() == (starts or [0, 0, 0])
    assert batch.pages.tolist() == ([[4, -1], [0, 3], [2, -1]] if pages else [[], [], []])
    assert batch.logits_rows.tolist() == [2, 3, 5]


def test_pages_are_the_batchs_own() -> None:
    pages = np.array([[1]], np.int32)
    batch = Batch.of_sequences([[1]], pages=pages)
    pages[0] = -5
    assert batch.pages.tolist() == [[1]]


@pytest.mark.parametrize("was_moved", [True, False])
def test_a_changed_batch_shares_no_view_with_the_one_before(was_moved: bool) -> None:
    there = Elsewhere()
    batch = Batch.of_sequences([[1, 2, 3]])
    if was_moved:
        batch.on(there)
        batch.derived(("whole",), lambda host: host)
    changed = replace(batch, logits_rows=int32(0))
    assert batch.on(there).logits_rows.values.tolist() == [2]
    assert changed.on(there).logits_rows.values.tolist() == [0]


KEPT = [field.name for field in fields(Batch) if not field.init]


def used(memory: Memory) -> tuple[Batch, Batch]:
    """Return a batch and its copy in a memory, each with all that it keeps for later."""
    batch = two_sequences()
    there = batch.on(memory)
    there.derived(("first",), lambda host: host.unchecked(logits_rows=int32(0)))
    return batch, there


@pytest.mark.parametrize("name", KEPT)
def test_a_changed_batch_keeps_nothing_that_was_kept_of_the_one_before(name: str) -> None:
    memory = DeviceMemory()
    batch, there = used(memory)
    before = [getattr(one, name) for one in (batch, there)]
    assert before[1], "only a copy has a mark"
    for one in (replace(batch, logits_rows=int32(0)), replace(there, memory=memory)):
        assert not getattr(one, name)
    assert [getattr(one, name) for one in (batch, there)] == before


def test_what_a_changed_batch_derives_follows_from_its_own_rows() -> None:
    def last(host: Batch) -> Batch:
        return host.unchecked(logits_rows=host.logits_rows[-1:])

    memory = DeviceMemory()
    batch = two_sequences()
    assert memory.to_host(batch.on(memory).derived(("last",), last).logits_rows).tolist() == [4]
    changed = replace(batch, logits_rows=int32(1, 0))
    assert memory.to_host(changed.on(memory).derived(("last",), last).logits_rows).tolist() == [0]
    assert [one.logits_rows.tolist() for one in changed.family()] == [[1, 0], [0]]


def test_a_length_that_no_longer_fits_a_changed_batch_is_refused() -> None:
    batch = two_sequences()
    ends, positions = int32(0, 1, 5), int32(5, 0, 1, 2, 3)
    with pytest.raises(ValueError, match="max_seqlen is 3, but must be the int 4"):
        replace(batch, cu_seqlens=ends, positions=positions)
    changed = replace(batch, cu_seqlens=ends, positions=positions, max_seqlen=4)
    assert changed.form.max_seqlen == 4


def test_a_batch_moves_from_one_memory_to_another_without_being_copied_to_the_host() -> None:
    here, there = Elsewhere("elsewhere"), Elsewhere("elsewhere, too")
    moved = two_sequences().on(here).on(there)
    assert moved.memory is there
    assert (here.crossings, there.crossings) == (len(module.ARRAYS),) * 2


def test_a_derived_batch_is_made_once_on_the_host_for_all_memories() -> None:
    made: list[Batch] = []

    def last_rows(host: Batch) -> Batch:
        made.append(host)
        return host.unchecked(logits_rows=host.cu_seqlens[1:] - np.int32(1))

    there = Elsewhere()
    batch = two_sequences()
    derived = batch.on(there).derived(("last",), last_rows)
    assert made == [batch]
    assert derived.memory is there
    assert derived.logits_rows.values.tolist() == [2, 4]
    assert batch.derived(("last",), last_rows).on(there) is derived
    assert batch.on(there).logits_rows.values.tolist() == [4, 2, 4]
    assert batch.derived(("another",), last_rows) is not batch.derived(("last",), last_rows)
    assert len(made) == 2


def test_what_is_made_of_a_batch_is_not_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = two_sequences()
    monkeypatch.setattr(module, "check", None)  # calling it would fail
    there = batch.on(Elsewhere())
    there.derived(("one",), lambda host: host.unchecked(logits_rows=int32(0)))
    Batch.of_sequences([[1]])


def test_a_batch_that_was_made_elsewhere_is_checked_where_its_arrays_can_be_read() -> None:
    batch, there = two_sequences(), Elsewhere()
    fields = {name: getattr(batch.on(there), name) for name in module.ARRAYS}
    sizes = {"max_seqlen": 3, "memory": there}
    assert Batch(**fields, **sizes).on(batch.memory).positions.tolist() == [5, 6, 7, 0, 1]
    fields["positions"] = there.from_host(int32(5, 6, 7, 3, 5))
    with pytest.raises(ValueError, match="not consecutive"):
        Batch(**fields, **sizes).on(batch.memory)


def test_batches_of_equal_sizes_have_one_form() -> None:
    form = two_sequences().form
    assert form == (5, 2, 3, 2, 3)
    alike: list[dict[str, Any]] = [
        {"token_ids": int32(9, 9, 9, 9, 9)},
        {"positions": int32(5, 6, 7, 1, 2)},
        {"logits_rows": int32(2, 4, 4)},
        {"cu_seqlens": int32(0, 2, 5), "positions": int32(6, 7, 0, 1, 2)},
        {"pages": np.array([[0, -1], [1, 2]], np.int32)},
    ]
    assert all(two_sequences(**changes).form == form for changes in alike)
    others: list[dict[str, Any]] = [
        {"logits_rows": int32(2, 4)},
        {"pages": np.array([[0], [1]], np.int32)},
        {"cu_seqlens": int32(0, 1, 5), "positions": int32(7, 0, 1, 2, 3), "max_seqlen": 4},
    ]
    assert all(two_sequences(**changes).form != form for changes in others)


def test_a_derived_batch_is_made_once_on_the_host_and_lies_where_its_origin_does() -> None:
    there, made = Elsewhere(), []

    def first_row(host: Batch) -> Batch:
        made.append(host.memory.name)
        return host.unchecked(logits_rows=int32(0))

    batch = two_sequences()
    assert batch.on(there).derived("first", first_row).logits_rows.values.tolist() == [0]
    assert batch.derived("first", first_row).logits_rows.tolist() == [0]
    assert made == ["host"]
    assert [one.logits_rows.tolist() for one in batch.family()] == [[4, 2, 4], [0]]


def test_what_is_packed_comes_back_from_a_copy_of_it() -> None:
    """What a captured forward reads: the arrays of a batch and its family, in one."""
    batch = two_sequences()
    batch.derived("first", lambda host: host.unchecked(logits_rows=int32(0)))
    memory = np.zeros_like(batch.packed())
    captured = batch.unpacked(Elsewhere(), memory)
    pages = np.array([[7, 6], [5, 4]], np.int32)
    other = two_sequences(token_ids=int32(9, 8, 7, 6, 5), pages=pages)
    other.derived("first", lambda host: host.unchecked(logits_rows=int32(3)))
    memory[:] = other.packed()
    for name in module.ARRAYS:
        np.testing.assert_array_equal(getattr(captured, name), getattr(other, name))
    first = captured.derived("first", lambda host: pytest.fail("it is there"))
    assert first.logits_rows.tolist() == [3]
    assert first.memory.name == captured.memory.name == "elsewhere"


def test_padding_rows_come_last_and_go_again() -> None:
    batch = two_sequences()
    padded = batch.padded(8)
    check(padded)
    assert padded.form == Form(tokens=8, sequences=5, logits=6, width=2, max_seqlen=3)
    assert padded.positions.tolist() == [5, 6, 7, 0, 1, -1, -1, -1]
    assert padded.pages[2:].tolist() == [[-1, -1]] * 3
    assert padded.logits_rows.tolist() == [4, 2, 4, 5, 6, 7]
    again = padded.without_padding()
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(again, name), getattr(batch, name), strict=True)
    assert again.form == batch.form
    assert batch.without_padding() is batch.padded(5) is batch
    nothing = Batch.of_sequences([])
    check(nothing.padded(2))
    assert nothing.padded(2).without_padding().form == nothing.form
    with pytest.raises(ValueError, match="the batch has 5 rows, which is more than 4"):
        batch.padded(4)


@pytest.mark.parametrize(
    ("field", "value"),
    [("pages", [[2, 1], [0, -1], [3, -1]]), ("cu_seqlens", [0, 2, 5, 6]), ("positions", -1)],
)
def test_wrong_padding_is_an_error(field: str, value: Any) -> None:
    padded = two_sequences().padded(6)
    if field == "positions":
        value = [5, 6, 7, -1, 0, -1]
    with pytest.raises(ValueError, match=r"negative|padding row|consecutive"):
        replace(padded, **{field: np.array(value, np.int32)})
