"""What hypothesis draws: specs of any kind, lengths of sequences, programs; and how it searches.

Weights and rows are not drawn, but a seed for them: they would take megabytes, and to make them
smaller explains nothing.  The one module of the kit that needs hypothesis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import hypothesis
from hypothesis import HealthCheck, Phase, Verbosity, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from hypothesis.errors import Flaky, Unsatisfiable

from lfm2kit import specs
from lfm2kit.specs import Spec
from lfm2kit.state import STEP_BACK
from lfm2kit.testing.programs import (
    MOST_SEQUENCES,
    Action,
    End,
    Feed,
    Fork,
    Program,
    StepBack,
    Steps,
)
from lfm2kit.testing.verdicts import CheckFailed

T = TypeVar("T")

# Three elements at least: of fewer, all may be so near to 0 that any rounding is a large error.
SIZES = st.integers(3, 40)
EPS = st.sampled_from([1e-5, 1e-2])
THETAS = st.sampled_from([1e6, 1e4, 5e3, 100.0])
SEEDS = st.integers(0, 2**32 - 1)


def lengths(most: int = 40, sequences: int = 5, *others: int) -> st.SearchStrategy[list[int]]:
    """Return a strategy of the lengths of some sequences, of up to `most` rows or of `others`."""
    one = st.integers(1, most)
    one = st.one_of(one, st.sampled_from(others)) if others else one
    return st.lists(one, min_size=1, max_size=sequences)


@st.composite
def norms(draw: st.DrawFn, size: int | None = None) -> specs.RMSNorm:
    return specs.RMSNorm(size or draw(SIZES), draw(EPS))


@st.composite
def convs(draw: st.DrawFn, size: int | None = None) -> specs.ShortConv:
    return specs.ShortConv(size or draw(SIZES), draw(st.integers(1, 5)), draw(st.booleans()))


@st.composite
def attentions(draw: st.DrawFn, size: int | None = None) -> specs.Attention:
    heads, of_each = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    head_dim = 2 * draw(st.integers(1, 12))
    theta, eps = draw(THETAS), draw(EPS)
    return specs.Attention(size or draw(SIZES), heads * of_each, heads, head_dim, theta, eps)


@st.composite
def mlps(draw: st.DrawFn, size: int | None = None) -> specs.MLP:
    return specs.MLP(size or draw(SIZES), draw(SIZES))


@st.composite
def routers(draw: st.DrawFn, size: int | None = None) -> specs.Router:
    count = draw(st.integers(1, 40))
    taken = draw(st.integers(1, min(count, 8)))
    scaling = draw(st.sampled_from([1.0, 2.5]))
    uses_bias, norms_weights = draw(st.booleans()), draw(st.booleans())
    return specs.Router(size or draw(SIZES), count, taken, uses_bias, norms_weights, scaling)


@st.composite
def experts(draw: st.DrawFn) -> specs.Experts:
    count = draw(st.integers(1, 12))
    taken = draw(st.integers(1, min(count, 4)))
    local = draw(st.lists(st.integers(0, count - 1), min_size=1, unique=True))
    return specs.Experts(draw(SIZES), draw(SIZES), count, taken, tuple(local))


@st.composite
def moes(draw: st.DrawFn, size: int | None = None) -> specs.SparseMoe:
    router = draw(routers(size))
    count, taken = router.num_experts, router.num_experts_per_tok
    local = tuple(range(count))
    there = specs.Experts(router.hidden_size, draw(SIZES), count, taken, local)
    return specs.SparseMoe(router, there)


@st.composite
def layers(draw: st.DrawFn, *, is_dense: bool = False) -> specs.Layer:
    size = draw(SIZES)
    operator = draw(st.one_of(convs(size), attentions(size)))
    feed_forward = draw(mlps(size) if is_dense else st.one_of(mlps(size), moes(size)))
    return specs.Layer(draw(norms(size)), operator, draw(norms(size)), feed_forward)


# A strategy of specs for each kind of block that the suite judges.
SPECS: dict[str, st.SearchStrategy[Any]] = {
    "embed": st.builds(specs.Embedding, st.integers(1, 300), SIZES),
    "norm": norms(),
    "conv": convs(),
    "attn": attentions(),
    "mlp": mlps(),
    "scores": routers().map(lambda router: router.scores),
    "choice": routers().map(lambda router: router.choice),
    "router": routers(),
    "experts": experts(),
    "moe": moes(),
    "rows": st.builds(specs.LastRows, SIZES),
    "head": st.builds(specs.LMHead, st.integers(3, 300), SIZES),
    "layer": layers(),
}
# Of those with a state; no choice of experts that is within rounding changes their rows.
WITH_STATE = {"conv": convs(), "attn": attentions(), "layer": layers(is_dense=True)}


def fitting(
    strategy: st.SearchStrategy[Any], fitted: Callable[[Spec], Spec | None]
) -> st.SearchStrategy[Any]:
    """Return a strategy of specs as `fitted` makes them, without those of which it makes None."""
    return strategy.map(fitted).filter(lambda spec: spec is not None)


def _actions() -> st.SearchStrategy[Action]:
    some = st.integers(0, MOST_SEQUENCES - 1)
    chunks = st.sampled_from([0, 1, 2, 3, 16, 60])
    firsts = st.sampled_from([0, 1, 2, 5, 7, 63, 64, 65])
    feed = st.builds(Feed, st.lists(chunks, max_size=MOST_SEQUENCES).map(tuple), firsts)
    step_back = st.builds(StepBack, some, st.integers(1, STEP_BACK))
    steps = st.builds(Steps, st.integers(1, 4))
    return st.one_of(feed, steps, st.builds(Fork, some), step_back, feed, st.builds(End, some))


def programs() -> st.SearchStrategy[Program]:
    """Return a strategy of programs of up to some 20 actions, often of ten."""
    half = st.lists(_actions(), max_size=10)
    begins = st.builds(Feed, st.just(()), st.sampled_from([1, 2, 5, 63, 64, 65]))
    actions = st.builds(lambda first, *halves: (first, *chain(*halves)), begins, half, half)
    return st.builds(Program, SEEDS, actions)


def together(*strategies: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    """Return a strategy of tuples with an example of each."""
    return st.tuples(*strategies)


def search(
    strategy: st.SearchStrategy[T], judge: Callable[[T], object], examples: int, seed: int = 0
) -> None:
    """Call `judge` with examples, the same ones for a seed; raise what it raises of the smallest.

    Raise `CheckFailed` as well if an example fails, and then no longer.  Nothing is called if no
    example is found, and no database of examples is kept.
    """
    failures: list[Exception] = []

    def noting(example: T) -> None:
        try:
            judge(example)
        except Exception as error:
            failures.append(error)
            raise

    searching = hypothesis.given(strategy)(noting)
    try:
        hypothesis.seed(seed)(_quietly(examples)(searching))()
    except Unsatisfiable:
        return
    except Flaky:
        raise CheckFailed(f"not every time, with the same arguments: {failures[0]}") from None


def _quietly(examples: int) -> settings:
    """Return settings that print and keep nothing, and know no deadline."""
    return settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        verbosity=Verbosity.quiet,
    )


@contextmanager
def keeping_nothing() -> Iterator[None]:
    """Let hypothesis write what it always writes into a folder that is then removed."""
    with TemporaryDirectory(prefix="lfm2kit-") as folder:
        set_hypothesis_home_dir(folder)
        try:
            yield
        finally:
            set_hypothesis_home_dir(None)
