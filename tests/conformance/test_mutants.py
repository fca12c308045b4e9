"""The suite sees what mutants get wrong, and what it is known to miss stays listed."""

from __future__ import annotations

import re

import pytest

from lfm2kit.backend import Backend
from lfm2kit.testing import CHECKS
from lfm2kit.testing.runner import judged
from tests.conformance.faulty_capabilities import SOUND
from tests.conformance.mutants import MISSED, MUTANTS

# These raise where their check looks; another one that raises is caught by accident.
CRASHES = {
    "empty_batch_with_state",
    "empty_table_of_pages",
    "choice_by_argpartition",
    "nobody_is_counted",
    "last_rows_none_wanted",
    "router_topk_by_argpartition",
}


def failures(backend: Backend, *names: str) -> dict[str, str]:
    """Return what each of these checks says that fails."""
    results = [judged(name, backend) for name in names]
    return {result.id: result.detail for result in results if result.verdict == "failed"}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_named_checks_catch_the_mutant(mutant: str) -> None:
    backend, names = MUTANTS[mutant]
    details = failures(backend, *names)
    assert sorted(details) == sorted(names)
    raised = [detail for detail in details.values() if re.match(r"\w+Error: ", detail)]
    assert mutant in CRASHES or not raised, raised


@pytest.mark.parametrize(
    ("mutant", "words"),
    [
        ("out_is_none", "returned None; arrays in memory 'host' are numpy.ndarray"),
        ("out_not_an_ndarray", "mutants.ForeignArray; arrays in memory 'host' are numpy.ndarray"),
        ("out_fortran_order", "float32 [17, 24], not C-contiguous: its strides are (4, 68)"),
        ("out_has_gaps", "float32 [17, 24], not C-contiguous: its strides are (192, 4)"),
        ("out_lacks_a_row", "returned float32 [16, 24], not float32 [17, 24]"),
        ("writes_equal_values", "argument 0 after the call: not the same bits"),
        ("out_is_view_of_argument", "a result shares memory with argument 0"),
    ],
)
def test_what_is_wrong_stands_in_a_sentence(mutant: str, words: str) -> None:
    backend, (name,) = MUTANTS[mutant]
    (detail,) = failures(backend, name).values()
    assert words in detail


@pytest.mark.parametrize(
    ("mutant", "words"),
    [
        ("beyond_x_written", "it wrote outside of its arrays, just behind argument 0"),
        ("before_a_weight_written", "it wrote outside of its arrays, just before weight 'weight'"),
        ("beyond_a_filled_result", "it wrote outside of its arrays, just behind result 0"),
    ],
)
def test_the_array_and_the_side_of_a_write_stand_in_a_sentence(mutant: str, words: str) -> None:
    backend, names = MUTANTS[mutant]
    assert all(detail.endswith(words) for detail in failures(backend, *names).values())


@pytest.mark.parametrize(
    ("sound", "check"),
    [
        ("begins", "begun-calls-have-the-blocks-bits"),
        ("native", "native-calls-have-the-blocks-bits"),
        ("tells", "parts-are-told-by-their-paths"),
        ("captures", "replays-do-not-disturb-each-other"),
    ],
)
def test_the_sound_backend_that_mutants_are_made_of_passes(sound: str, check: str) -> None:
    assert judged(check, SOUND[sound]).verdict == "passed"


@pytest.mark.long
@pytest.mark.parametrize("mutant", MISSED)
def test_a_missed_mutant_is_missed_by_every_check(mutant: str) -> None:
    """If one is caught, its place is in MUTANTS."""
    backend, why = MISSED[mutant]
    assert failures(backend, *CHECKS) == {}, f"it is no longer true that {why}"


@pytest.mark.long
@pytest.mark.parametrize("mutant", MUTANTS)
def test_all_checks_end_with_a_mutant(mutant: str) -> None:
    """Whatever a mutant does to the checks that are not about it, they give verdicts."""
    backend, names = MUTANTS[mutant]
    assert set(names) <= set(failures(backend, *CHECKS))
