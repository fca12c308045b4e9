"""Runs forwards with and without marks, in turn, so that what the marks cost is known."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace

from lfm2kit.batch import Batch
from lfm2kit.building.results import Checked
from lfm2kit.measuring.bench import WARM_UPS
from lfm2kit.model import LFM2
from lfm2kit.profiling.marks import Marks, Span, marked
from lfm2kit.state import ModelState, Room

Stage = Callable[[str, int], AbstractContextManager[Callable[[], None]]]
MOST_OVERHEAD = 0.03  # with more, marks are put into one layer after the other


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is measured: a forward of a batch, or a step from a state of these sequences.

    Each repetition does the same step again, because a sequence may step back.
    """

    batch: Batch
    before: Batch | None = None  # that the state holds
    room: Room | None = None


@dataclass(slots=True)
class Profile:
    """Seconds of forwards without marks and with them, and the spans of the latter.

    With marks in one layer after the other, each group of blocks has forwards of its own.
    """

    plain: list[float] = field(default_factory=list)
    marked: list[float] = field(default_factory=list)
    spans: list[list[Span]] = field(default_factory=list)  # of each forward with marks
    groups: int = 1
    timeline: list[Span] = field(default_factory=list)  # of a forward with marks in all blocks

    @property
    def seconds(self) -> float:
        """Return the median of a forward without marks."""
        return statistics.median(self.plain)

    @property
    def overhead(self) -> float:
        """Return what share of a forward its marks cost: a median over neighbours in time."""
        pairs = zip(self.marked, self.plain, strict=True)
        return statistics.median(marked / plain for marked, plain in pairs) - 1


@contextmanager
def unseen(what: str, forwards: int) -> Iterator[Callable[[], None]]:
    """Show nothing of a stage."""
    yield lambda: None


def profiled(
    model: LFM2,
    blocks: Sequence[Checked],
    prompt: Prompt,
    repetitions: int,
    stage: Stage = unseen,
) -> Profile:
    """Measure forwards of a model, whose blocks are given, `repetitions` times each way.

    The first stage has marks in all blocks; if they cost more than MOST_OVERHEAD, a second one has
    them in one layer after the other.  `stage` is called with the name of each and the number of
    its forwards, and gives what is called after each of these.
    """
    whole, of_a_group = Profile(), 2 * (WARM_UPS + repetitions)
    with stage("measuring", of_a_group) as done:
        _measure(model, blocks, prompt, repetitions, whole, done)
    whole.timeline = whole.spans[-1]
    if whole.overhead <= MOST_OVERHEAD:
        return whole
    groups = _by_layer(blocks)
    apart = Profile(groups=len(groups), timeline=whole.timeline)
    with stage("measuring layer by layer", len(groups) * of_a_group) as done:
        for group in groups:
            _measure(model, group, prompt, repetitions, apart, done)
    return apart if apart.overhead < whole.overhead else whole


def _measure(
    model: LFM2,
    blocks: Sequence[Checked],
    prompt: Prompt,
    repetitions: int,
    profile: Profile,
    done: Callable[[], None],
) -> None:
    """Add the seconds and spans of forwards with marks in some blocks to a profile."""
    marks = Marks()
    with _ready(model, prompt) as plain, _ready(replace(model), prompt) as watched:
        for i in range(WARM_UPS + repetitions):
            without = _seconds(plain)
            done()
            with marked(blocks, marks), marks.of_a_forward():
                with_marks = _seconds(watched)
            done()
            if i >= WARM_UPS:
                profile.plain.append(without)
                profile.marked.append(with_marks)
                profile.spans.append(list(marks.spans()))


@contextmanager
def _ready(model: LFM2, prompt: Prompt) -> Iterator[Callable[[], object]]:
    """Give a function that does the forward; a model has replays and a state of its own."""
    state: ModelState | None = None
    if prompt.room is not None and prompt.before is not None:
        state = model.new_state(prompt.room)
        model.logits(prompt.before, state)
    yield lambda: model.logits(prompt.batch, state)


def _seconds(forward: Callable[[], object]) -> float:
    start = time.perf_counter()
    forward()
    return time.perf_counter() - start


def _by_layer(blocks: Sequence[Checked]) -> list[list[Checked]]:
    """Return the blocks of each layer, and those around the layers together."""
    groups: dict[str, list[Checked]] = {}
    for block in blocks:
        words = block.placed.name.split(".")
        groups.setdefault(words[1] if words[0] == "layers" else "", []).append(block)
    return list(groups.values())
