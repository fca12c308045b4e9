"""Runs forwards with and without marks, in turn, so that what the marks cost is known.

On several ranks, all of them begin each forward together.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from lfm2kit.batch import Batch
from lfm2kit.measuring.bench import WARM_UPS
from lfm2kit.model import LFM2
from lfm2kit.profiling.clocks import Ahead, clocks_of
from lfm2kit.profiling.marks import Marks, Span
from lfm2kit.profiling.sending import waits_apart
from lfm2kit.profiling.watched import Watched, marked, memory_of, name_of
from lfm2kit.ranks.joining import Alone
from lfm2kit.state import Room
from lfm2kit.transport import Transport, everyones

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


class Job(NamedTuple):
    """The ranks that measure together, and those of them that exchange tokens with this one."""

    ranks: Transport = Alone()
    among: Transport | None = None


@dataclass(slots=True)
class Profile:
    """Seconds of forwards without marks and with them, and the spans of the latter.

    With marks in one layer after the other, each group of blocks has forwards of its own.
    """

    plain: list[float] = field(default_factory=list)  # until the last rank has ended
    marked: list[float] = field(default_factory=list)
    own: list[float] = field(default_factory=list)  # without marks, until this rank has ended
    spans: list[list[Span]] = field(default_factory=list)  # of each forward with marks
    groups: int = 1
    timeline: list[Span] = field(default_factory=list)  # of a forward with marks in all blocks
    begin: float = 0.0  # of that forward, by this rank's clock
    clocks: list[Ahead] = field(default_factory=list)  # of all ranks, just after it

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
    watched: Sequence[Watched],
    prompt: Prompt,
    repetitions: int,
    stage: Stage = unseen,
    job: Job = Job(),  # noqa: B008 (it has no state)
) -> Profile:
    """Measure forwards of a model, `repetitions` times each way; every rank of a job calls this.

    `watched` are its blocks and the places where it may wait.
    The first stage has marks in all of these; if they cost more than MOST_OVERHEAD, a second one
    has them in one layer after the other.  `stage` is called with the name of each and the number
    of its forwards, and gives what is called after each of these.
    """
    measuring = _Measuring(model, prompt, repetitions, job)
    whole, of_a_group = Profile(), 2 * (WARM_UPS + repetitions)
    with stage("measuring", of_a_group) as done:
        whole.begin = measuring.add(watched, whole, done)
    whole.timeline = whole.spans[-1]
    whole.clocks = clocks_of(job.ranks)
    if whole.overhead <= MOST_OVERHEAD:
        return whole
    groups = _by_layer(watched)
    apart = replace(whole, plain=[], marked=[], own=[], spans=[], groups=len(groups))
    with stage("measuring layer by layer", len(groups) * of_a_group) as done:
        for group in groups:
            measuring.add(group, apart, done)
    return apart if apart.overhead < whole.overhead else whole


class _Measuring(NamedTuple):
    """Forwards to measure."""

    model: LFM2
    prompt: Prompt
    repetitions: int
    job: Job

    def add(self, watched: Sequence[Watched], profile: Profile, done: Callable[[], None]) -> float:
        """Add the seconds and spans of forwards with marks in `watched` to a profile.

        Return when the last of them began.
        """
        marks = Marks(map(memory_of, watched))
        plain, with_marks, spans = list[float](), list[float](), list[list[Span]]()
        with self._ready(self.model) as forward, self._ready(replace(self.model)) as again:
            for _ in range(WARM_UPS + self.repetitions):
                self.job.ranks.barrier()
                plain.append(_seconds(forward))
                done()
                with marked(watched, marks):
                    self.job.ranks.barrier()
                    with marks.of_a_forward():
                        with_marks.append(_seconds(again))
                spans.append(list(marks.spans()))
                done()
        profile.own += plain[WARM_UPS:]
        ways = everyones(self.job.ranks, [plain[WARM_UPS:], with_marks[WARM_UPS:]])
        of_the_last = ways.max(axis=0).tolist()
        profile.plain += of_the_last[0]
        profile.marked += of_the_last[1]
        profile.spans += waits_apart(spans[WARM_UPS:], self.job.among)
        return marks.begin

    @contextmanager
    def _ready(self, model: LFM2) -> Iterator[Callable[[], object]]:
        """Give a function that does the forward; a model has replays and a state of its own."""
        prompt, state = self.prompt, None
        if prompt.room is not None and prompt.before is not None:
            state = model.new_state(prompt.room)
            model.logits(prompt.before, state)
        yield lambda: model.logits(prompt.batch, state)


def _seconds(forward: Callable[[], object]) -> float:
    start = time.perf_counter()
    forward()
    return time.perf_counter() - start


def _by_layer(watched: Sequence[Watched]) -> list[list[Watched]]:
    """Return what is in each layer, and what is around the layers together."""
    groups: dict[str, list[Watched]] = {}
    for one in watched:
        words = name_of(one).split(".")
        groups.setdefault(words[1] if words[0] == "layers" else "", []).append(one)
    return list(groups.values())
