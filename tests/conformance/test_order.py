"""A backend whose memory works while the host goes on passes every check."""

from __future__ import annotations

import pytest

from lfm2kit.testing.runner import judged
from tests.conformance.ahead import DrawsAhead
from tests.conformance.crossing import CrossingBackend
from tests.conformance.each_check import each_check
from tests.conformance.late import LateBackend

ORDER = (
    "copies-to-the-host-keep-their-order",
    "results-cross-streams",
    "batches-cross-streams",
    "threads-do-not-disturb-each-other",
    "marks-measure-time",
)
TIMED = ("timed-marks-tell-of-the-newest-replay",)


@pytest.mark.parametrize("name", list(each_check()))
def test_a_memory_that_works_as_late_as_it_may_passes(name: str) -> None:
    result = judged(name, LateBackend())
    assert result.verdict == ("passed" if name in ORDER else result.verdict), result.detail
    assert not result.is_failure, result.detail


CROSSINGS = (
    "crossings-have-the-blocks-bits",
    "crossings-can-be-replayed",
    "crossings-fail-by-name",
    "crossings-tell-their-waits",
)
CHANNELS = (
    "channels-carry-every-trip",
    "channels-end-a-wait",
    "channels-wait-as-long-as-they-are-told",
)


@pytest.mark.parametrize("name", CROSSINGS)
def test_a_simple_server_passes(name: str) -> None:
    result = judged(name, CrossingBackend())
    assert result.verdict == "passed", result.detail


CAPTURED = ("captured-forward", "captured-steps", "steps-begun-ahead", "tokens-drawn-ahead")


@pytest.mark.parametrize("name", [*ORDER, *TIMED, *CHANNELS, *CAPTURED])
def test_a_device_that_is_a_thread_passes(name: str) -> None:
    result = judged(name, DrawsAhead())
    assert result.verdict == "passed", result.detail
