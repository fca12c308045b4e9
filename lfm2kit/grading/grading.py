"""Grades a plan by the assignment's scheme: measures it, validates it, and counts points."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lfm2kit.backend import Ceilings
from lfm2kit.building.loading import Setup
from lfm2kit.building.options import Options
from lfm2kit.errors import Lfm2kitError, Option
from lfm2kit.grading.blocks import TESTS, VALUES, block_setup, contender, error_of, reference_setup
from lfm2kit.grading.kinds import KindGrade, by_kind, reasons
from lfm2kit.grading.models import (
    COUNTS,
    FP16,
    TWICE,
    Built,
    Switch,
    built,
    in_precision,
    switches,
    switches_of_form,
    validated,
)
from lfm2kit.measuring.bench import WARM_UPS, Limit, Measured, measure, measured_ceilings
from lfm2kit.measuring.validate import Verdict
from lfm2kit.profiling.forwards import Stage


class BlockGrade(NamedTuple):
    kind: str
    values: str  # how inputs and weights were drawn
    tokens_per_second: float
    threshold: float
    points: float  # 0 if its results are wrong
    seconds: Sequence[float]
    error: float  # beside the reference's, relative to the largest value
    is_valid: bool


class Speed(NamedTuple):
    """A model's speed at a number of samples."""

    name: str
    samples: int
    samples_per_second: float
    seconds: Sequence[float]


class Bought(NamedTuple):
    """What an optimisation buys: the time without it, over the time with it."""

    name: str
    how: str
    ratio: float


class OfRanks(NamedTuple):
    """A job of several ranks, measured beside one of a single rank."""

    ranks: int
    speed: Speed
    is_valid: bool | None  # None: there are no answers to be validated by


@dataclass(slots=True)
class Graded:
    blocks: list[BlockGrade] = field(default_factory=list)
    speeds: list[Speed] = field(default_factory=list)  # of FP32, at each number of samples
    verdict: Verdict | str = ""  # of FP32 at the best number, or why there is none
    half: Speed | None = None  # FP16 at the best number
    half_verdict: Verdict | str = ""
    factor: float | None = None  # of FP16's speed to FP32's
    kinds: list[KindGrade] = field(default_factory=list)  # FP16 beside FP32
    analysis: list[str] = field(default_factory=list)  # why FP16 is less than twice as fast
    of_ranks: OfRanks | None = None
    bought: list[Bought] = field(default_factory=list)
    not_measured: list[str] = field(default_factory=list)

    @property
    def is_valid(self) -> bool:
        """Return whether nothing that was validated is wrong."""
        verdicts = [one for one in (self.verdict, self.half_verdict) if isinstance(one, Verdict)]
        of_ranks = self.of_ranks is None or self.of_ranks.is_valid is not False
        return of_ranks and all([b.is_valid for b in self.blocks] + [v.is_valid for v in verdicts])

    @property
    def measured_speeds(self) -> list[Speed]:
        """Return the speeds of the whole model in each precision and on several ranks."""
        others = [self.half, self.of_ranks and self.of_ranks.speed]
        return [*self.speeds, *(one for one in others if one is not None)]

    @property
    def best(self) -> Speed:
        return max(self.speeds, key=lambda one: one.samples_per_second)


def grade(setup: Setup, repetitions: int, stage: Stage) -> Graded:
    """Measure blocks and model; `stage` gives what is called after each timed call of a stage."""
    graded = Graded()
    graded.blocks = list(_blocks(setup.options, repetitions, stage))
    one = built("fp32", setup)
    graded.speeds = [_speed(one.name, n, found) for n, found in _at_each(one, repetitions, stage)]
    best = graded.best.samples
    graded.verdict = validated(one, best)
    _grade_half(graded, one, best, repetitions, stage)
    graded.bought += _bought(one, switches(one), best, repetitions, stage)
    return graded


def _blocks(options: Options, repetitions: int, stage: Stage) -> Iterator[BlockGrade]:
    for values in VALUES:
        setup, reference = block_setup(options, values), reference_setup(options, values)
        for test in TESTS:
            with stage(f"{test.kind}, {values.name}", WARM_UPS + repetitions) as done:
                (found,) = measure([contender(setup, test, values)], repetitions, {}, done)
            speed = found.contender.tokens / found.median
            error = error_of(setup, reference, test, values)
            is_valid = error <= setup.grade.block_error
            points = test.points(speed) if is_valid else 0.0
            yield BlockGrade(
                test.kind,
                values.name,
                speed,
                test.threshold,
                points,
                found.seconds,
                error,
                is_valid,
            )


def _at_each(one: Built, repetitions: int, stage: Stage) -> Iterator[tuple[int, Measured]]:
    contenders = [one.contender(n) for n in COUNTS]
    with stage("the whole model", len(COUNTS) * (WARM_UPS + repetitions)) as done:
        yield from zip(COUNTS, measure(contenders, repetitions, {}, done), strict=True)


def _speed(name: str, n: int, found: Measured) -> Speed:
    return Speed(name, n, n / found.median, found.seconds)


def _grade_half(graded: Graded, one: Built, n: int, repetitions: int, stage: Stage) -> None:
    """Measure FP16 beside FP32, in turn, and say what limits it if it is not twice as fast."""
    setup = in_precision(one.setup, FP16)
    if setup is None:
        graded.not_measured.append(f"FP16: a backend of '{one.setup.plan}' does not have it")
        return
    half = built(FP16, setup)
    with stage("FP16 beside FP32", 2 * (WARM_UPS + repetitions)) as done:
        whole, other = measure([one.contender(n), half.contender(n)], repetitions, {}, done)
    graded.half, graded.factor = _speed(FP16, n, other), whole.median / other.median
    graded.half_verdict = validated(half, n)
    ceilings = measured_ceilings(half.setup)
    graded.kinds = by_kind(one, half, n, repetitions, ceilings, stage)
    graded.bought += _bought(half, switches_of_form(half), n, repetitions, stage)
    if graded.factor < TWICE:
        whole_limit = _limit(one, whole, measured_ceilings(one.setup))
        graded.analysis = [*whole_limit, *_limit(half, other, ceilings), *reasons(graded.kinds)]


def _limit(one: Built, found: Measured, ceilings: Ceilings | None) -> Iterator[str]:
    """Say how near a forward is to what its work takes at the measured ceilings."""
    if ceilings is None:
        return
    least = Limit.of(found.contender.work, ceilings)
    yield (
        f"{one.name}: {least.unit} limits; at the measured ceilings the work takes "
        f"{1e3 * least.seconds:.3g} ms, and it took {1e3 * found.median:.3g} ms "
        f"({least.seconds / found.median:.0%} of the limit)"
    )


def _bought(
    one: Built, some: Iterable[Switch], n: int, repetitions: int, stage: Stage
) -> Iterator[Bought]:
    """Yield what each switch buys, the model with and without it taking turns."""
    for switch in some:
        contenders = [one.contender(n), switch.built.contender(n)]
        with stage(switch.name, 2 * (WARM_UPS + repetitions)) as done:
            with_it, other = measure(contenders, repetitions, {}, done)
        ratio = other.median / with_it.median
        yield Bought(switch.name, switch.how, 1 / ratio if switch.is_added else ratio)


def check_precision(options: Options) -> None:
    """Raise `Lfm2kitError` for another precision than FP32, for which the points are."""
    if options.precision != "fp32":
        asked = Option("precision", options.precision)
        raise Lfm2kitError(asked, ": all points but FP16's are for FP32; leave it out")
