"""What a run of the suite looks at, beside what a check says itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TypeVar

from lfm2kit.errors import Lfm2kitError, Option
from lfm2kit.specs import Spec
from lfm2kit.testing.patterns import Pattern
from lfm2kit.testing.widths import Widths, first_of_each, resized

S = TypeVar("S", bound=Spec)

OUT_OF_SCOPE = "it looks at no block of those that are asked for"
EXAMPLES = 30  # of each kind of block, and as many programs: 5 s of a core's time for cpu_simd


@dataclass(frozen=True, slots=True)
class Scope:
    """The choices of whoever runs the suite."""

    seed: int = 0  # another one draws other inputs
    examples: int = 0  # random ones of each kind of block, for the checks of random examples
    patterns: tuple[Pattern, ...] = ()  # of the blocks that are looked at; (): of all
    widths: Widths | None = None  # of a model, instead of the cases' own

    def candidates(self, cases: Iterable[S]) -> list[S]:
        """Return the cases that are looked at, in this scope's widths.

        In a model's widths that is one of each type, because their weights are large.
        """
        if self.widths is not None:
            cases = [resized(spec, self.widths) for spec in first_of_each(cases)]
        return list(filter(self.has, cases))

    def has(self, spec: Spec) -> bool:
        """Return whether the blocks of this spec are looked at."""
        return not self.patterns or any(pattern.fits(spec) for pattern in self.patterns)


DEFAULT_SCOPE = Scope()


def examples_here(asked: int | None = None) -> int:
    """Return the number of random examples: as many as are asked for, or what is usual here.

    Without hypothesis there are none; raise `Lfm2kitError` if some are asked for.
    """
    has_hypothesis = find_spec("hypothesis") is not None
    if asked and not has_hypothesis:
        how = "needs the package hypothesis; type: pip install 'lfm2kit[testing]'"
        raise Lfm2kitError(Option("examples", asked), f": {how}")
    return (EXAMPLES if asked is None else asked) if has_hypothesis else 0
