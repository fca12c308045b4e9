"""`lfm2kit compare`: two records of one command, before and after a change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Column

from lfm2kit.building.byte_counts import size
from lfm2kit.cli.console import STDOUT, only_said, show_table
from lfm2kit.cli.options import JsonOption, typed_path
from lfm2kit.cli.report import Report
from lfm2kit.cli.text_input import STDIN, text_of
from lfm2kit.errors import WRONG_RESULT, Lfm2kitError
from lfm2kit.records.comparing import Change, Compared, Comparison, Verdict
from lfm2kit.records.figures import Figure
from lfm2kit.records.noise import LEAST, Interval
from lfm2kit.records.reading import Read, parse_record, read_record

JUDGED = (Verdict.worse, Verdict.better, Verdict.within)
NOT_THERE = "-"


def compare(
    before: Annotated[str, typer.Argument(metavar="BEFORE|-", help="A record; - reads stdin.")],
    after: Annotated[
        str, typer.Argument(metavar="AFTER|-", help="A record of the same command; - reads stdin.")
    ],
    fail_on_slower: Annotated[
        bool,
        typer.Option(
            "--fail-on-slower", help="Exit with code 1 if a figure is worse by more than the noise."
        ),
    ] = False,
    json: JsonOption = None,
) -> None:
    """Show what has changed between two records, and which figures by more than the noise."""
    report = Report(json, "lfm2kit compare")
    paths = [Path(name) for name in (before, after) if name != STDIN]
    report.check_apart({"one of the records": paths})
    if before == after == STDIN:
        raise Lfm2kitError("- and -: stdin has one record; give a file for the other")
    comparison = Comparison.of(_read(before), _read(after))
    if fail_on_slower:
        _check_judged(comparison)
    report.fields = _fields(comparison)
    if json != STDOUT:
        _show(report, comparison)
    report.line(comparison.line())
    is_worse = fail_on_slower and comparison.counts()[Verdict.worse] > 0
    with only_said(when=is_worse):
        report.write()
    if is_worse:
        raise typer.Exit(WRONG_RESULT)


def _read(name: str) -> Read:
    if name == STDIN:
        return parse_record("stdin", text_of(name).encode())
    return read_record(typed_path("BEFORE and AFTER", name))


def _check_judged(comparison: Comparison) -> None:
    """Raise `Lfm2kitError` if nothing in the records could make `--fail-on-slower` fail."""
    counts = comparison.counts()
    if counts[Verdict.unknown] and not any(counts[one] for one in JUDGED):
        few = min(len(f.values) for one in comparison.figures for f in one if f.better is not None)
        raise Lfm2kitError(
            f"--fail-on-slower: no figure has enough values to know its noise: {LEAST} are needed, "
            f"and there are {few}; measure with lfm2kit bench --repetitions {LEAST} or more"
        )


def _fields(comparison: Comparison) -> dict[str, Any]:
    both = (comparison.before, comparison.after)
    return {
        "of": comparison.before.kind,
        "records": [{"name": one.name, "date": one.date} for one in both],
        "other_hardware": comparison.other_hardware,
        "changes": [change._asdict() for change in comparison.changes],
        "compared": [_compared(one) for one in comparison.figures],
        "only_before": comparison.only_in(comparison.before),
        "only_after": comparison.only_in(comparison.after),
        "verdict": comparison.line(),
    }


def _compared(one: Compared) -> dict[str, Any]:
    figures = zip((one.before, one.after), one.medians, one.intervals, strict=True)
    before, after = (_side(*of) for of in figures)
    return {
        "name": one.before.name,
        "unit": one.before.unit,
        "better": one.before.better,
        "before": before,
        "after": after,
        "change": one.change,
        "verdict": str(one.verdict),
    }


def _side(figure: Figure, median: float, interval: Interval | None) -> dict[str, Any]:
    low, high = (None, None) if interval is None else interval
    return {"median": median, "low": low, "high": high, "values": len(figure.values)}


def _show(report: Report, comparison: Comparison) -> None:
    if other := comparison.other_hardware:
        said = f"the machines differ ({', '.join(other)})"
        report.line(f"{said}: the figures compare machines rather than versions")
    before, after = comparison.before, comparison.after
    report.line(f"{before.kind}: {before.name} of {before.date}, {after.name} of {after.date}")
    if comparison.changes:
        headings = [Column(heading, overflow="fold") for heading in ("changed", "before", "after")]
        _show_table([*_rows_of_changes(comparison.changes)], headings)
    if comparison.figures:
        headings = [Column("figure", overflow="fold")]
        headings += [Column(name, justify="right") for name in ("before", "after", "change")]
        _show_table([_row(one) for one in comparison.figures], [*headings, Column("verdict")])
    for record in (before, after):
        if only := comparison.only_in(record):
            report.line(f"only in {record.name}: {', '.join(only)}")


def _show_table(rows: Sequence[Sequence[str]], headings: Sequence[Column]) -> None:
    show_table(rows, *headings, box=SIMPLE_HEAD, pad_edge=False)


def _rows_of_changes(changes: Sequence[Change]) -> Iterator[list[str]]:
    """Yield a row for each change; one for all blocks that have changed in the same way."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for change in changes:
        column = change.name.rpartition(".")[2]
        key = (change.part, column, _text(change.before), _text(change.after))
        alike.setdefault(key, []).append(change.name)
    for (_, _, before, after), names in alike.items():
        more = f" and {len(names) - 1} others" if len(names) > 1 else ""
        yield [f"{names[0]}{more}", before, after]


def _text(value: Any) -> str:
    if value is None:
        return NOT_THERE
    return value if isinstance(value, str) else dumps(value)


def _row(one: Compared) -> list[str]:
    figures = zip((one.before, one.after), one.medians, one.intervals, strict=True)
    change = NOT_THERE if one.change is None else f"{100 * one.change:+.1f} %"
    return [one.before.name, *(_number(*of) for of in figures), change, _said(one)]


def _number(figure: Figure, median: float, interval: Interval | None) -> str:
    """Return a median, and its interval if the figure has noise."""
    if figure.better is None or interval is None:
        return _in_unit(median, figure)
    low, high = (_in_unit(one, figure) for one in interval)
    return f"{_in_unit(median, figure)} ({low} to {high})"


def _in_unit(value: float, figure: Figure) -> str:
    if figure.unit == "s":
        return f"{1e3 * value:.4g} ms"
    if figure.unit == "B" and figure.better is not None:
        return size(value)
    digits = f"{value:.0f}" if value == int(value) else f"{value:.4g}"
    return f"{digits} {figure.unit}".rstrip()


def _said(one: Compared) -> str:
    """Return the verdict, and why the noise is not known."""
    if one.verdict is not Verdict.unknown:
        return str(one.verdict)
    few = min(len(one.before.values), len(one.after.values))
    return f"{'one measurement' if few == 1 else f'{few} measurements'}: {one.verdict}"
