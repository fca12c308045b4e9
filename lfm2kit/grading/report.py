"""The report in Markdown: tables of what was measured, and what was not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from lfm2kit.grading.grading import Graded, OfRanks
from lfm2kit.grading.kinds import KindGrade
from lfm2kit.measuring.validate import Verdict, word


def tables(graded: Graded) -> Iterator[tuple[str, Sequence[str], list[Sequence[str]]]]:
    """Yield the tables of a report: a title, headings, and rows."""
    yield (
        "Blocks",
        ("block", "values", "tokens/s", "threshold", "points", "error", ""),
        [
            (b.kind, b.values, f"{b.tokens_per_second:.0f}", f"{b.threshold:.0f}",
             f"{b.points:.1f} of 10", f"{b.error:.1e}", word(is_valid=b.is_valid))
            for b in graded.blocks
        ],
    )  # fmt: skip
    yield (
        "The whole model",
        ("precision", "samples at once", "samples/s"),
        [
            (one.name, str(one.samples), f"{one.samples_per_second:.1f}")
            for one in graded.measured_speeds
        ],
    )
    if graded.kinds:
        yield (
            "FP16 by kind of block",
            ("block", "backend", "FP32 ms", "FP16 ms", "times as fast", "limit", "% of limit"),
            [_kind(one) for one in graded.kinds],
        )
    if graded.bought:
        yield (
            "What optimisations buy",
            ("optimisation", "compared with", "times as fast"),
            [(one.name, one.how, f"{one.ratio:.2f}") for one in graded.bought],
        )


def _kind(one: KindGrade) -> Sequence[str]:
    reached = "-" if one.roofline is None else f"{one.roofline:.0%}"
    seconds = (f"{1e3 * each:.3g}" for each in (one.seconds, one.half_seconds))
    return one.kind, one.backend, *seconds, f"{one.factor:.2f}", one.limit or "-", reached


def sentences(graded: Graded) -> Iterator[str]:
    """Yield what tables do not say: verdicts, FP16's factor and its reason, what is missing."""
    best = graded.best
    yield (
        f"best: {best.samples_per_second:.1f} samples/s with {best.samples} at once, "
        f"{_said(graded.verdict)}"
    )
    if graded.factor is not None:
        factor, said = f"{graded.factor:.2f} times as fast as FP32", _said(graded.half_verdict)
        yield f"FP16 is {factor}, {said}"
    for one in graded.analysis:
        yield f"why FP16 is less than twice as fast: {one}"
    if graded.of_ranks is not None:
        yield _said_of_ranks(graded.of_ranks)
    for one in graded.not_measured:
        yield f"not measured: {one}"


def _said(verdict: Verdict | str) -> str:
    if isinstance(verdict, str):
        return verdict
    said = word(is_valid=verdict.is_valid)
    return f"{said} (top-1 {verdict.top1_matches} of {verdict.samples})"


def _said_of_ranks(found: OfRanks) -> str:
    said = "not validated" if found.is_valid is None else word(is_valid=found.is_valid)
    return f"{found.ranks} ranks: {found.speed.samples_per_second:.1f} samples/s, {said}"


def markdown(title: str, facts: Mapping[str, str], graded: Graded) -> str:
    """Return the whole report: what was graded and where, its tables and sentences."""
    lines = [f"# {title}", "", *(f"- {name}: {said}" for name, said in facts.items()), ""]
    for heading, columns, rows in tables(graded):
        lines += [f"## {heading}", "", _row(columns), "|---" * len(columns) + "|"]
        lines += [*map(_row, rows), ""]
    return "\n".join([*lines, *(f"- {one}" for one in sentences(graded)), ""])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
