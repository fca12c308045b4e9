"""`lfm2kit bench`: a table of medians, beside what the machine allows."""

from __future__ import annotations

import csv
import enum
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from shlex import quote
from typing import Annotated, Any

import numpy as np
import typer

from lfm2kit import bounds
from lfm2kit.backend import Ceilings
from lfm2kit.building.loading import Setup, set_up
from lfm2kit.building.options import BACKEND_VARIABLE, About, Options
from lfm2kit.building.plan import AUTO
from lfm2kit.checkpoint import Checkpoint
from lfm2kit.cli import scaling
from lfm2kit.cli.console import STDOUT, complain, progress, remark
from lfm2kit.cli.options import (
    JsonOption,
    TransportOption,
    Without,
    files_of,
    flags,
    open_model,
    spread,
)
from lfm2kit.cli.ranks import refuse_copies
from lfm2kit.cli.report import Report
from lfm2kit.cli.rewrite_options import check_state, option_of
from lfm2kit.errors import WRONG_RESULT, Lfm2kitError
from lfm2kit.measuring.bench import (
    WARM_UPS,
    Contender,
    Measured,
    decodings,
    forwards,
    measure,
    measured_ceilings,
)
from lfm2kit.measuring.decoding import most_tokens
from lfm2kit.measuring.given_texts import GUESSES, LEAST_CONTEXT, NONE
from lfm2kit.measuring.scaling import Job
from lfm2kit.measuring.single_blocks import single_blocks
from lfm2kit.memory import HOST
from lfm2kit.ranks.launchers import DEFAULT_TRANSPORT
from lfm2kit.records.machine import machine_of
from lfm2kit.text import printable

# A share of a call's time.  On idle cores calls waited for 0.09 of their time at most; with one
# other process on the same cores for 0.33 and more, and took twice as long.
TOO_MUCH_WAITING = 0.25


class Block(enum.StrEnum):
    embed = "embed"
    norm = "norm"
    conv = "conv"
    attn = "attn"
    mlp = "mlp"
    scores = "scores"
    choice = "choice"
    router = "router"
    experts = "experts"
    moe = "moe"
    rows = "rows"
    head = "head"
    layer = "layer"
    model = "model"


class Form(enum.StrEnum):
    md = "md"
    csv = "csv"


class _Table:
    """The rows of a table, which go to stdout, and to a record."""

    def __init__(self, report: Report, form: Form) -> None:
        if form is Form.csv and report.target == STDOUT:
            raise Lfm2kitError("-o csv and --json - do not go together: both go to stdout")
        self.report = report
        self._form = form

    def put(
        self,
        rows: Sequence[dict[str, Any]],
        seconds: Mapping[str, Sequence[float]],
        in_texts: Callable[[dict[str, Any]], dict[str, str]],
    ) -> None:
        """Print the table, and write the record, in which each row names a figure of `seconds`."""
        if self.report.target != STDOUT:
            self._print([in_texts(row) for row in rows])
        self.report.fields = {"results": list(rows)}
        for name, values in seconds.items():
            self.report.figure(name, "s", values, "lower")
        self.report.write()

    def _print(self, rows: Sequence[dict[str, str]]) -> None:
        table = [list(rows[0]), *([printable(text) for text in row.values()] for row in rows)]
        if self._form is Form.csv:
            csv.writer(sys.stdout).writerows(table)
            return
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        table.insert(1, ["-" * width for width in widths])
        for line in table:
            cells = (text.ljust(width) for text, width in zip(line, widths, strict=True))
            print("| " + " | ".join(cells) + " |")


@spread
def bench(
    options: Annotated[Options, Without(("backend", "plan", "n_cpu_moe"))],
    backend: Annotated[
        list[str] | None,
        flags(
            "backend",
            About(
                "Plan to measure; repeat the option to compare several.",
                f"${BACKEND_VARIABLE}, or auto",
                metavar="PLAN",
            ),
        ),
    ] = None,
    n: Annotated[
        str, typer.Option("-n", metavar="N,...", help="Samples in a forward, as a list.")
    ] = "1,16,64",
    block: Annotated[
        list[Block] | None,
        typer.Option(
            metavar="|".join(Block),
            help="Measure this block alone, of a backend that need not build others; repeat the "
            "option for several.",
        ),
    ] = None,
    decode: Annotated[
        bool,
        typer.Option(
            "--decode", help="Measure decoding: one token after another, of -n sequences."
        ),
    ] = False,
    seq_len: Annotated[
        str,
        typer.Option(
            "--seq-len",
            metavar="N,...",
            help="Tokens in a sample, or of a sequence from which decoding begins, as a list.",
        ),
    ] = "16",
    speculate: Annotated[
        str,
        typer.Option(
            metavar="|".join(GUESSES),
            help="What guesses the tokens that are decoded, as a list; but for none, texts repeat "
            "themselves, and every guess is right.",
        ),
    ] = NONE,
    repetitions: Annotated[
        int, flags("repetitions", About("Timed calls of each row of the table.", least=1))
    ] = 5,
    ranks: Annotated[
        str | None,
        typer.Option(
            metavar="R,...",
            help="Compare these numbers of ranks, each in jobs of its own. \\[default: no job]",
        ),
    ] = None,
    transport: TransportOption = DEFAULT_TRANSPORT,
    output: Annotated[
        Form, typer.Option("-o", "--output", metavar="|".join(Form), help="Format of the table.")
    ] = Form.md,
    json: JsonOption = None,
) -> None:
    """Measure a model or its blocks, and compare the medians with this machine's ceilings."""
    refuse_copies()
    samples = _whole_numbers("-n", n, "1,16,64")
    lengths = _whole_numbers("--seq-len", seq_len, "16,4096")
    if not decode:
        bounds.check_tokens(max(samples), max(lengths))
    guesses = _guesses(speculate, lengths if decode else None)
    if decode and block:
        raise Lfm2kitError("--decode measures the whole model; leave out --block")
    if options.rewrites and block:
        option = option_of(options.rewrites[0])
        raise Lfm2kitError(f"--block measures blocks of the model as it is; leave out {option}")
    plans = list(dict.fromkeys(backend or [_default_plan()]))  # each once, and so below
    if ranks is not None:
        if decode or block:
            raise Lfm2kitError("--ranks measures the whole model; leave out --decode and --block")
        sizes = _whole_numbers("--ranks", ranks, "1,2,4")
        if len(lengths) > 1:
            raise Lfm2kitError(f"--seq-len {seq_len}: with --ranks it takes one number")
        jobs = [Job(plan, size, n) for plan in plans for n in samples for size in sizes]
        table = _Table(Report(json, scaling.KIND), output)
        _bench_jobs(table, options, jobs, lengths[0], repetitions, transport)
        return
    scaling.check_of_ranks(options, ranks)
    table = _Table(Report(json, "lfm2kit bench"), output)
    checkpoint, seed = open_model(options), options.seed or 0
    table.report.check_apart(files_of(checkpoint, options))
    # What is not measured need not be built.
    may_lack = block is not None and Block.model not in block
    setups = [
        set_up(checkpoint, replace(options, backend=plan), may_lack=may_lack) for plan in plans
    ]
    if decode:
        check_state("--decode", setups[0].rewrites)
    for setup in setups:
        for note in setup.notes():
            remark(note)
    if decode:
        contenders_of = partial(_decodings, samples, lengths, guesses, WARM_UPS + repetitions, seed)
    else:
        contenders_of = partial(_forwards, block or [], samples, lengths, seed)
    with np.errstate(all="ignore"):  # what is not finite is told once, at the end
        named = {
            _named(plan, plans, contender.test): contender
            for plan, setup in zip(plans, setups, strict=True)
            for contender in contenders_of(setup)
        }
        ceilings = {str(s.plan): c for s in setups if (c := measured_ceilings(s)) is not None}
        total = (WARM_UPS + repetitions) * len(named)
        with progress("measuring", total, "calls") as advance:
            measured = measure([*named.values()], repetitions, ceilings, lambda: advance(1))
    defaults = {str(setup.plan): setup.plan.default for setup in setups}
    figures = dict(zip(named, measured, strict=True))
    rows = [
        {"figure": name, **_row(checkpoint, m, options, defaults[m.contender.backend])}
        for name, m in figures.items()
    ]
    table.report.machine = machine_of(*setups)
    table.put(rows, {name: m.seconds for name, m in figures.items()}, _texts)
    _warn_of_waiting(measured, setups)
    _tell_ceilings(ceilings, defaults)
    _tell_guesses(measured)
    _end_where_not_finite(
        {f"{m.contender.backend}: {m.contender.test}": m.is_finite for m in measured}
    )


def _bench_jobs(
    table: _Table,
    options: Options,
    jobs: Sequence[Job],
    seq_len: int,
    repetitions: int,
    transport: str,
) -> None:
    """Measure jobs, and print a table of them."""
    checkpoint = open_model(options)
    table.report.check_apart(files_of(checkpoint, options))
    measured = scaling.scaled(options, jobs, seq_len, repetitions, transport)
    for note in scaling.notes(measured):
        remark(note)
    rows = scaling.rows(checkpoint, options, measured, seq_len)
    plans = list(dict.fromkeys(job.plan for job in jobs))
    names = [
        _named(job.plan, plans, f"{row['test']} on {row['ranks']} ranks")
        for job, row in zip(jobs, rows, strict=True)
    ]
    table.report.machine = scaling.machine_of(options, measured)
    table.put(
        [{"figure": name, **row} for name, row in zip(names, rows, strict=True)],
        {name: one.seconds for name, one in zip(names, measured, strict=True)},
        scaling.texts,
    )
    _end_where_not_finite(
        {f"{row['backend']}: {row['test']} on {row['ranks']} ranks": row["finite"] for row in rows}
    )


def _named(plan: str, plans: Sequence[str], test: str) -> str:
    """Return a row's name, which names its plan among several alone: plans can be compared, too."""
    return test if len(plans) == 1 else f"{plan}: {test}"


def _default_plan() -> str:
    """Return the plan from the environment, unsplit: Typer would split a list's at blanks."""
    return os.environ.get(BACKEND_VARIABLE) or AUTO


def _guesses(text: str, contexts: Sequence[int] | None) -> list[str]:
    """Return the names of a list of guesses, for texts with these contexts; None: no texts."""
    names = text.split(",")
    if not set(names) <= GUESSES.keys():
        raise Lfm2kitError(f"--speculate {text}: expected a list of {', '.join(GUESSES)}")
    if text != NONE and contexts is None:
        raise Lfm2kitError(f"--speculate {text} needs --decode, which is not given")
    if contexts and set(names) != {NONE} and min(contexts) < LEAST_CONTEXT:
        raise Lfm2kitError(
            f"--speculate {text}: no text has repeated itself after {min(contexts)} tokens; give "
            f"--seq-len {LEAST_CONTEXT} or more"
        )
    return list(dict.fromkeys(names))


def _decodings(
    samples: Sequence[int],
    contexts: Sequence[int],
    guesses: Sequence[str],
    steps: int,
    seed: int,
    setup: Setup,
) -> Iterator[Contender]:
    model = setup.build(tokens=most_tokens(samples, contexts, guesses))
    return decodings(setup, model, samples, contexts, guesses, steps, seed)


def _forwards(
    blocks: Sequence[Block], samples: Sequence[int], lengths: Sequence[int], seed: int, setup: Setup
) -> Iterator[Contender]:
    """Yield the forwards of the blocks, or of the whole model without any."""
    for block in dict.fromkeys(blocks) or [Block.model]:
        if block is Block.model:
            model = setup.build(tokens=max(samples) * max(lengths))
            yield from forwards(setup, model, samples, lengths, seed)
        else:
            yield from single_blocks(setup, block.value, samples, lengths, seed)


def _row(
    checkpoint: Checkpoint, measured: Measured, options: Options, default: str
) -> dict[str, Any]:
    contender, median, ceilings = measured.contender, measured.median, measured.ceilings
    return {
        "model": checkpoint.path.name,
        "parameters": checkpoint.spec.weight_elements(),
        "backend": contender.backend,
        "precision": contender.precision,
        "threads": options.threads or "all",
        "test": contender.test,
        "speculate": contender.speculate,
        "tokens": contender.tokens,
        "samples_per_second": contender.samples / median,
        "tokens_per_second": contender.tokens / median,
        "median_seconds": median,
        "deviation": measured.spread / median,
        "gflops": contender.work.flops / median / 1e9,
        "gbytes_per_second": contender.work.bytes / median / 1e9,
        "roofline": measured.roofline,
        "memory_share": measured.memory_share,
        "ceilings": ceilings and {**ceilings._asdict(), "measured_by": default},
        "waiting": measured.waiting,
        "finite": measured.is_finite,
    }


def _tell_ceilings(ceilings: Mapping[str, Ceilings], defaults: Mapping[str, str]) -> None:
    """Say what shares are of, and who has measured it."""
    for plan, (flops, read) in ceilings.items():
        remark(
            f"{plan}: this machine's ceilings, measured in this run by {defaults[plan]}: "
            f"{flops / 1e9:.3g} GFLOP/s, {read / 1e9:.3g} GB/s read"
        )


def _tell_guesses(measured: Sequence[Measured]) -> None:
    """Say what texts guesses were measured on, and how many tokens a step had."""
    guessed = {m.contender.speculate: m.contender for m in measured}
    for speculate, one in guessed.items():
        if speculate not in (None, NONE):
            remark(
                f"{speculate}: in texts that repeat themselves every guess is right, which makes "
                f"{one.tokens / one.samples:.3g} tokens of a sequence a step; other texts gain less"
            )


def _warn_of_waiting(measured: Sequence[Measured], setups: Sequence[Setup]) -> None:
    """Warn in one line if blocks on the CPU had to share cores, which falsifies their times."""
    on_cpu = {str(s.plan) for s in setups if _is_on_cpu(s)}
    rows = [m for m in measured if m.contender.backend in on_cpu]
    waiting = [(m.waiting or 0.0, f"{m.contender.backend}: {m.contender.test}") for m in rows]
    late = [row for row in waiting if row[0] >= TOO_MUCH_WAITING]
    if late:
        share, name = max(late)
        remark(
            f"warning: a thread waited for a core for {share:.0%} of a call's time ({name}), in "
            f"{len(late)} of {len(rows)} rows for {TOO_MUCH_WAITING:.0%} or more: their times are "
            "too long; stop other programs, or give fewer --threads"
        )


def _end_where_not_finite(are_finite: Mapping[str, bool]) -> None:
    """End with one line and exit code 1 if a result had NaN or infinities."""
    wrong = [row for row, is_finite in are_finite.items() if not is_finite]
    if wrong:
        rows = f"{len(wrong)} of {len(are_finite)} rows"
        complain(f"the results are not finite in {rows} ({wrong[0]})")
        raise typer.Exit(WRONG_RESULT)


def _is_on_cpu(setup: Setup) -> bool:
    return all(leaf.memory.name == HOST.name for leaf in setup.placed.leaves())


def _texts(row: dict[str, Any]) -> dict[str, str]:
    """Return a row of the table: as llama-bench's, and the share of what the machine allows."""
    return {
        "model": row["model"],
        "params": f"{row['parameters'] / 1e6:.4g} M",
        "backend": row["backend"],
        "precision": row["precision"],
        "threads": str(row["threads"]),
        "test": row["test"],
        "samples/s": f"{row['samples_per_second']:.4g}",
        "tokens/s": f"{row['tokens_per_second']:.4g} ± {100 * row['deviation']:.0f} %",
        "ms": f"{1e3 * row['median_seconds']:.4g}",
        "GFLOP/s": f"{row['gflops']:.3g}",
        "GB/s": f"{row['gbytes_per_second']:.3g}",
        "% of memory": _percent(row["memory_share"]),
        "% of roofline": _percent(row["roofline"]),
    }


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f}"


def _whole_numbers(option: str, text: str, example: str) -> list[int]:
    """Return the numbers of a list, in its order and each once."""
    try:
        numbers = [int(item) for item in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise Lfm2kitError(
            f"{option} {quote(text)}: expected whole numbers of 1 or more, such as {example}"
        )
    if max(numbers) > bounds.COUNT:
        raise Lfm2kitError(f"{option} {text}: lfm2kit takes up to {bounds.COUNT}")
    return list(dict.fromkeys(numbers))
