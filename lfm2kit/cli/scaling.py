"""`lfm2kit bench --ranks 1,2,4`: the same forwards on several numbers of ranks."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

import typer

from lfm2kit.backend import Context
from lfm2kit.building.options import Options
from lfm2kit.building.plugins import find_transport
from lfm2kit.checkpoint import Checkpoint
from lfm2kit.cli.console import complain, progress
from lfm2kit.cli.options import OF_RANKS
from lfm2kit.cli.rewrite_options import option_of
from lfm2kit.errors import WRONG_RESULT, Lfm2kitError
from lfm2kit.measuring.scaling import Job, Record, Scaled, measure, speed_up
from lfm2kit.records.machine import described
from lfm2kit.transport import rank_command

KIND = "lfm2kit bench --ranks"  # of the record
APART = ("backend", "rewrites")  # options of a job that are not passed on as they are


def scaled(
    options: Options, jobs: Sequence[Job], seq_len: int, repetitions: int, transport: str
) -> list[Scaled]:
    """Return the measurements of jobs, each of which is an `lfm2kit run` of its own."""
    size = find_transport(transport).launcher.world_size()
    if size is not None:
        raise Lfm2kitError(f"this is a rank of a job of {size}; --ranks starts jobs itself")
    shared = [*_words(options), "--random-inputs", str(seq_len), "--transport", transport]
    with progress("measuring", repetitions * len(jobs), "jobs") as advance:

        def run(job: Job) -> Record:
            record = _record(["run", *shared, *_words_of(job)])
            advance(1)
            return record

        return measure(jobs, repetitions, run)


def is_job_valid(options: Options, job: Job, transport: str) -> bool:
    """Run a job on the model's own samples, and return whether its answers are right."""
    words = [*_words(options), "--transport", transport, *_words_of(job), "--validate"]
    return bool(_record(["run", *words])["validation"]["valid"])


def alone(options: Options) -> Options:
    """Return the options without those of jobs, for what one process does.

    A load places the experts of ranks, and in one process only those within a limit of memory.
    """
    names = (*OF_RANKS, "load") if options.gpu_memory is None else OF_RANKS
    defaults: dict[str, Any] = {
        one.name: one.default for one in fields(Options) if one.name in names
    }
    return replace(options, **defaults)


def check_of_ranks(options: Options, ranks: object) -> None:
    """Raise `Lfm2kitError` for options of jobs if no number of ranks is given."""
    for one in fields(Options) if ranks is None else ():
        if one.name in OF_RANKS and getattr(options, one.name) != one.default:
            raise Lfm2kitError(f"--{one.name.replace('_', '-')} needs --ranks, such as --ranks 2")


def notes(measured: Sequence[Scaled]) -> Iterator[str]:
    """Yield what the jobs have remarked, each sentence once."""
    yield from dict.fromkeys(note for one in measured for note in one.records[0]["notes"])


def rows(
    checkpoint: Checkpoint, options: Options, measured: Sequence[Scaled], seq_len: int
) -> list[dict[str, Any]]:
    """Return a row of the table for each job, with its seconds in parts where these are known."""
    name = "+".join(["model", *options.rewrites])
    return [
        {
            "model": checkpoint.path.name,
            "parameters": checkpoint.spec.weight_elements(),
            "backend": one.records[0]["backend"],
            "precision": one.records[0]["precision"],
            "ranks": one.job.ranks,
            "groups": one.records[0]["groups"],
            "test": f"{name} {one.job.samples}x{seq_len}",
            "samples_per_second": one.job.samples / one.median,
            "median_seconds": one.median,
            "deviation": one.spread / one.median,
            "speed_up": speed_up(one, measured),
            "parts": None if one.parts is None else one.parts._asdict(),
            "finite": one.is_finite,
        }
        for one in measured
    ]


def machine_of(options: Options, measured: Sequence[Scaled]) -> dict[str, Any]:
    """Return the machine of a record: this one, and the devices that the jobs have named."""
    devices = {
        name: named
        for one in measured
        for name, named in one.records[0]["machine"].get("devices", {}).items()
    }
    here = described(Context(options.precision, options.threads))
    return {**here, **({"devices": devices} if devices else {})}


def texts(row: dict[str, Any]) -> dict[str, str]:
    """Return a row of the table as it is printed."""
    parts = row["parts"] or {}
    return {
        "model": row["model"],
        "params": f"{row['parameters'] / 1e6:.4g} M",
        "backend": row["backend"],
        "precision": row["precision"],
        "ranks": str(row["ranks"]),
        "test": row["test"],
        "samples/s": f"{row['samples_per_second']:.4g} ± {100 * row['deviation']:.0f} %",
        "speed-up": f"{row['speed_up']:.2f}",
        "ms": f"{1e3 * row['median_seconds']:.4g}",
        **{
            f"{name} ms": f"{1e3 * parts[name]:.4g}" if parts else "-"
            for name in ("compute", "exchange", "waiting")
        },
    }


def _words(options: Options) -> Iterator[str]:
    """Yield what is typed for options that differ from their defaults."""
    for one in fields(Options):
        value = getattr(options, one.name)
        if one.name not in APART and value != one.default:
            yield f"--{one.name.replace('_', '-')}"
            yield from [] if value is True else [str(value)]
    for name in options.rewrites:
        yield from option_of(name).split(maxsplit=1)


def _words_of(job: Job) -> list[str]:
    samples = str(job.samples)
    words = ["--backend", job.plan, "--ranks", str(job.ranks), "-n", samples]
    return [*words, "--batch-size", samples, "--warmup", "--json", "-"]


def _record(arguments: Sequence[str]) -> Record:
    """Run `lfm2kit *arguments`, and return its JSON; a job that fails ends this command."""
    command = rank_command(arguments)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as job:
        try:
            out, said = job.communicate()
        except BaseException:  # Ctrl-C as well: the job ends its ranks
            job.terminate()
            raise
    if job.returncode in (0, WRONG_RESULT) and out:
        record: Record = json.loads(out)
        return record
    _, _, sentence = said.rpartition("lfm2kit: error: ")
    complain(" ".join(sentence.split()) or f"a job ended with the exit code {job.returncode}")
    raise typer.Exit(job.returncode)
