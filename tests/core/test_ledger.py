"""The ledger refuses a batch that does not go on from what its pages hold, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from lfm2kit.batch import Batch
from lfm2kit.ledger import Ledger, Run
from lfm2kit.state import Room

T = 64


def chunk(*sequences: tuple[int, int, Sequence[int]]) -> Batch:
    """Return a batch of sequences by start, number of new tokens, and pages."""
    starts, lengths, pages = zip(*sequences, strict=True)
    return Batch.of_sequences([np.zeros(n, np.int32) for n in lengths], starts=starts, pages=pages)


def write(ledger: Ledger, *sequences: tuple[int, int, Sequence[int]]) -> None:
    batch = chunk(*sequences)
    ledger.begin(batch)
    ledger.complete(batch)


def refused(ledger: Ledger, says: str, *sequences: tuple[int, int, Sequence[int]]) -> None:
    with pytest.raises(ValueError, match=says) as error:
        ledger.begin(chunk(*sequences))
    assert "\n" not in str(error.value)


@pytest.fixture
def ledger() -> Ledger:
    """Return a ledger of two sequences: 70 tokens in pages 5 and 2, and 3 tokens in page 0."""
    ledger = Ledger(Room(8, T))
    write(ledger, (0, 70, [5, 2]), (0, 3, [0]))
    return ledger


def test_a_page_that_is_not_there(ledger: Ledger) -> None:
    refused(
        ledger, "sequence 0 names page 8, but the state has 8 pages, numbered from 0", (0, 1, [8])
    )
    refused(ledger, "sequence 1 names page 9, but", (0, 1, [3]), (0, 1, [1, 9]))


def test_too_few_pages(ledger: Ledger) -> None:
    refused(
        ledger, "sequence 0 of 65 tokens needs 2 pages of 64, but the batch names 1", (0, 65, [1])
    )
    refused(ledger, "needs 2 pages of 64, but the batch names 0", (70, 1, []))
    refused(ledger, "of 129 tokens needs 3 pages of 64, but .* names 2", (70, 59, [5, 2]))


def test_a_page_that_is_written_twice(ledger: Ledger) -> None:
    says = "sequence 0 writes page 1, which sequence 1 names as well; give it a page of its own"
    refused(ledger, says, (0, 1, [1]), (0, 1, [1]))
    refused(ledger, "sequence 1 writes page 3, which sequence 2", *((0, 1, [p]) for p in (1, 3, 3)))
    says = "sequence 0 writes page 1, which itself names a second time; give it a page"
    refused(ledger, says, (0, 100, [1, 1]))


def test_a_page_that_is_begun_or_replaced_while_another_sequence_reads_it(ledger: Ledger) -> None:
    says = "sequence 0 writes page 5, which sequence 1 names as well"
    refused(ledger, says, (0, 1, [5]), (70, 1, [5, 2]))
    refused(ledger, f"{says}; give it a page of its own", (60, 4, [5]), (70, 1, [5, 2]))
    refused(ledger, says, (0, 100, [1, 5]), (70, 1, [5, 2]))


def test_a_fork_within_a_page_says_that_it_can_start_at_the_whole_pages_before(
    ledger: Ledger,
) -> None:
    says = (
        "sequence 0 writes page 2, which sequence 1 names as well; it can go on from 64 in a page"
    )
    refused(ledger, says, (70, 1, [5, 2]), (70, 1, [5, 2]))
    refused(ledger, "page 3 is empty; it can go on from 64", (70, 1, [5, 2]), (70, 1, [5, 3]))
    write(ledger, (70, 1, [5, 2]), (64, 7, [5, 3]))


def test_a_start_that_is_not_where_the_pages_end(ledger: Ledger) -> None:
    says = "sequence 1 goes on after 71 tokens, but its pages hold 70; it can go on from 70"
    refused(ledger, says, (3, 1, [0]), (71, 1, [5, 2]))
    refused(ledger, "after 4 tokens, but its pages hold 3; it can go on from 3", (4, 1, [0]))
    refused(ledger, "after 1 tokens, but page 7 is empty; start it at 0 again", (1, 1, [7]))


def test_pages_of_another_sequence_or_in_another_order(ledger: Ledger) -> None:
    refused(ledger, "page 2 does not hold its first tokens; start it at 0", (70, 1, [2, 5]))
    refused(ledger, "page 2 does not go on from page 0 as it is now", (70, 1, [0, 2]))
    refused(ledger, "page 2 does not hold its first tokens", (3, 1, [2]))


ANOTHER = "page 2 does not go on from page 5 as it is now; start it at 0 again, or at 64 if its"


def test_a_page_that_another_sequence_has_taken_since(ledger: Ledger) -> None:
    write(ledger, (0, T, [5]))
    refused(ledger, ANOTHER, (70, 1, [5, 2]))
    write(ledger, (64, 1, [5, 3]))


def test_a_page_that_was_replaced_by_a_step_back(ledger: Ledger) -> None:
    write(ledger, (60, 4, [5]))  # its owner went back from 70 to 60
    refused(ledger, ANOTHER, (70, 1, [5, 2]))
    write(ledger, (64, 1, [5, 2]))


@pytest.mark.parametrize("back", [1, 6, 16])
def test_a_step_back_of_up_to_16_tokens(ledger: Ledger, back: int) -> None:
    write(ledger, (70, 20, [5, 2]))
    write(ledger, (90 - back, 1, [5, 2]))
    write(ledger, (91 - back, 1, [5, 2]))


def test_a_step_back_is_counted_from_the_most_that_a_page_has_held(ledger: Ledger) -> None:
    write(ledger, (70, 20, [5, 2]))
    write(ledger, (80, 1, [5, 2]))
    write(ledger, (74, 1, [5, 2]))
    says = "page 2 has held tokens up to 90, .* go back by at most 16; it can go on from 74"
    refused(ledger, says, (73, 1, [5, 2]))


def test_a_step_back_across_the_end_of_a_page(ledger: Ledger) -> None:
    refused(
        ledger, "up to 64, and it can go back by at most 16; it can go on from 48", (47, 1, [5])
    )
    write(ledger, (54, 1, [5]))
    write(ledger, (55, 20, [5, 2]))


def test_sequences_share_whole_pages(ledger: Ledger) -> None:
    write(ledger, (64, 3, [5, 1]), (64, 3, [5, 3]), (70, 1, [5, 2]))
    write(ledger, (67, 1, [5, 1]), (67, 1, [5, 3]), (71, 1, [5, 2]))


def test_pages_may_be_named_ahead(ledger: Ledger) -> None:
    write(ledger, (70, 1, [5, 2, 7, 6]), (3, 1, [0, 4]))
    write(ledger, (71, 1, [5, 2, 7, 6]), (4, 1, [0, 4]))


def test_what_a_failed_forward_wrote_is_lost(ledger: Ledger) -> None:
    ledger.begin(chunk((70, 1, [5, 2])))
    says = "page 2 was lost when a forward failed; it can go on from 64"
    refused(ledger, says, (70, 1, [5, 2]))
    refused(ledger, says, (71, 1, [5, 2]))
    write(ledger, (3, 1, [0]))
    write(ledger, (64, 1, [5, 2]))


def test_a_step_that_fails_among_others_is_lost_with_what_went_before(ledger: Ledger) -> None:
    for position in range(3, 8):
        write(ledger, (position, 1, [0]))
    ledger.begin(chunk((8, 1, [0])))
    refused(ledger, "page 0 was lost .*; start it at 0 again", (8, 1, [0]))
    write(ledger, (0, 2, [0]))


@pytest.mark.parametrize("wrong", [(71, 1, [5, 2]), (0, 1, [8]), (70, 1, [2, 5]), (0, 1, [0])])
def test_a_refused_batch_changes_nothing(ledger: Ledger, wrong: tuple[int, int, list[int]]) -> None:
    first = (3, 1, [0])
    with pytest.raises(ValueError, match="sequence"):
        ledger.begin(chunk(first, wrong))
    for position in range(70, 75):
        write(ledger, (position, 1, [5, 2]), (position - 67, 1, [0]))


def test_steps_of_decoding_end_with_a_page_and_are_told_from_others(ledger: Ledger) -> None:
    """They are recognised by their pages and positions alone, and must not hide a wrong one."""
    for position in range(70, 128):
        write(ledger, (position, 1, [5, 2, 3]))
    write(ledger, (128, 1, [5, 2, 3]))
    write(ledger, (129, 1, [5, 2, 3]))
    refused(ledger, "hold 130", (131, 1, [5, 2, 3]))
    refused(ledger, "page 7 is empty; it can go on from 128", (130, 1, [5, 2, 7]))
    write(ledger, (130, 1, [5, 2, 3]))
    write(ledger, (0, 1, [2]))
    refused(ledger, "page 2 does not go on from page 5", (131, 1, [5, 2, 3]))


def test_a_step_back_that_failed_spoils_what_was_written_after_it(ledger: Ledger) -> None:
    ledger.begin(chunk((60, 4, [5])))  # back from 70, and the forward fails
    refused(ledger, "page 5 was lost", (70, 1, [5, 2]))
    refused(ledger, "page 5 was lost", (64, 1, [5, 3]))


@pytest.mark.parametrize("position", [70, 71])
def test_an_interrupt_before_the_books_are_closed_loses_the_pages(
    ledger: Ledger, position: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    write(ledger, (70, 1, [5, 2])) if position == 71 else None
    batch = chunk((position, 1, [5, 2]))
    ledger.begin(batch)
    monkeypatch.setattr(Run, "after", interrupted)
    monkeypatch.setattr(Run, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ledger.complete(batch)
    monkeypatch.undo()
    refused(ledger, "page 2 was lost", (position + 1, 1, [5, 2]))
    write(ledger, (3, 1, [0]))
