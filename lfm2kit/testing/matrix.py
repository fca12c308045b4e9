"""Which blocks a backend builds, by kind, width and precision, and which the suite judges."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from lfm2kit.backend import Backend, Context
from lfm2kit.building.plugins import Plugins
from lfm2kit.precisions import Precision
from lfm2kit.specs import Spec, leaves
from lfm2kit.testing.call_log import CallLog
from lfm2kit.testing.cases import CASES, REAL_WIDTHS, WIDTHS, widened
from lfm2kit.testing.checks import CHECKS
from lfm2kit.testing.host_block import why_not_built
from lfm2kit.testing.runner import Result, judged

State = Literal["judged", "in part", "failed", "built", "not built"]

SMALL, MIDDLE = "1-63", "64-255"
COLUMNS = (SMALL, MIDDLE, *map(str, WIDTHS))  # of hidden_size


class Cell(NamedTuple):
    """What is known of the blocks of one kind and width in one precision."""

    precision: str
    kind: str
    width: str  # one of COLUMNS
    state: State
    detail: str  # why it is not built, which checks fail, or what is not promised


@dataclass(frozen=True, slots=True)
class _Seen:
    """The specs of blocks that checks have looked at, and what came of it."""

    judged: set[Spec] = field(default_factory=set)
    not_promised: dict[Spec, list[str]] = field(default_factory=dict)  # names of promises
    failed: dict[Spec, list[str]] = field(default_factory=dict)

    def add(self, result: Result, log: CallLog) -> None:
        """Add what a check has built: its failure is that of the block it names, or the last."""
        self.judged.update(log.specs)
        if result.verdict == "not-promised" and result.promise is not None:
            for spec in log.specs:
                self.not_promised.setdefault(spec, []).append(result.promise)
        if result.verdict == "failed" and log.specs:
            said = [spec for spec in log.specs if result.detail.startswith(str(spec))]
            self.failed.setdefault([*log.specs, *said][-1], []).append(result.id)


def support_matrix(
    name: str,
    plugins: Plugins,
    contexts: Iterable[Context],
    ids: Sequence[str] = (),
    done: Callable[[Result], None] = lambda result: None,
) -> list[Cell]:
    """Return the cells of an installed backend, in the order of precisions, kinds and widths.

    One context is given for each precision.  The checks are those of `ids`, or all.  Raise
    `Lfm2kitError` if the backend cannot run, or lacks a precision.
    """
    cells: list[Cell] = []
    not_promised = plugins.backend(name).not_promised
    for context in contexts:
        backend = plugins.creator(context)(name)
        precision = plugins.precision(name, context.precision)
        seen = _Seen()
        for check in ids or CHECKS:
            log = CallLog()
            result = judged(check, backend, precision, log=log, not_promised=not_promised)
            seen.add(result, log)
            done(result)
        cells += _cells(backend, precision, seen)
    return cells


def _cells(backend: Backend, precision: Precision, seen: _Seen) -> Iterator[Cell]:
    for kind in CASES:
        for width, some in _by_width(kind).items():
            yield Cell(precision.name, kind, width, *_state(backend, some, seen))


def _state(backend: Backend, some: Sequence[Spec], seen: _Seen) -> tuple[State, str]:
    failed = [name for spec in some for name in seen.failed.get(spec, ())]
    if failed:
        return "failed", ", ".join(dict.fromkeys(failed))
    reasons = [r for spec in some if (r := why_not_built(backend, spec)) is not None]
    if len(reasons) == len(some):
        return "not built", reasons[0]
    missing = f"{len(reasons)} of {len(some)} are not built: {reasons[0]}" if reasons else ""
    taken_back = dict.fromkeys(p for spec in some for p in seen.not_promised.get(spec, ()))
    if taken_back:
        said = f"not promised: {', '.join(taken_back)}"
        return "in part", "; ".join(filter(None, (said, missing)))
    return "judged" if seen.judged.intersection(some) else "built", missing


def _by_width(kind: str) -> dict[str, list[Spec]]:
    """Return the suite's specs of a kind by their column, as they are and widened."""
    found: dict[str, list[Spec]] = {}
    wider = (widened(spec, width) for width in WIDTHS for spec in CASES[kind])
    real = (spec for spec in REAL_WIDTHS if spec.kind == kind)
    for spec in dict.fromkeys([*CASES[kind], *wider, *real]):
        found.setdefault(_column(spec), []).append(spec)
    return found


def _column(spec: Spec) -> str:
    """Return the column of a spec; a choice, which has no width, is in the first one."""
    width = next((leaf.hidden_size for leaf in leaves(spec) if hasattr(leaf, "hidden_size")), 1)
    return SMALL if width < 64 else MIDDLE if width < WIDTHS[0] else str(width)
