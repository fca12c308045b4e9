"""`lfm2kit run`: samples in, logits out, validated and timed.  The graded command."""

from __future__ import annotations

import os
import resource
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import typer

from lfm2kit import progress as steps
from lfm2kit import samples
from lfm2kit.checkpoint import Checkpoint, check_no_part
from lfm2kit.cli import options
from lfm2kit.cli.console import Report, progress, remark
from lfm2kit.cli.ranks import ending_all_ranks, joined_job, launched
from lfm2kit.errors import Lfm2kitError
from lfm2kit.files import check_target
from lfm2kit.loading import Setup, set_up
from lfm2kit.model import LFM2
from lfm2kit.plan import Plan
from lfm2kit.plugins import Plugins, installed_plugins
from lfm2kit.running import Timed, default_batch_size, run_samples
from lfm2kit.specs import Work
from lfm2kit.transport import Transport, World
from lfm2kit.validate import Verdict, nothing_to_compare, validate

MOST_BY_DEFAULT = 128  # samples: the assignment's largest choice


def run(
    model: options.ModelOption = "tiny",
    backend: options.BackendOption = None,
    plan: options.PlanOption = None,
    n: Annotated[
        int | None,
        options.whole_number("-n", help="Samples to run. [default: all, 128 at most]"),
    ] = None,
    validate_outputs: Annotated[
        bool, typer.Option("--validate", "-v", help="Compare the outputs with the answers.")
    ] = False,
    warmup: Annotated[
        bool, typer.Option("--warmup", "-w", help="Run one batch before the timed run.")
    ] = False,
    batch_size: Annotated[
        int | None,
        options.whole_number(
            "--batch-size", help="Samples in a forward. [default: 4096 tokens' worth]"
        ),
    ] = None,
    inputs: Annotated[
        Path | None, typer.Option(help="Token ids. [default: inputs.bin beside the model]")
    ] = None,
    random_inputs: Annotated[
        int | None,
        options.whole_number(
            "--random-inputs", metavar="TOKENS", help="Random ids, so many a sample, not a file."
        ),
    ] = None,
    seed: Annotated[int, options.whole_number("--seed", least=0, help="Of the random ids.")] = 0,
    answers: Annotated[
        Path | None, typer.Option(help="Expected logits. [default: answers.bin beside the model]")
    ] = None,
    outputs: Annotated[
        Path | None, typer.Option(help="Where to write the logits. [default: nowhere]")
    ] = None,
    precision: options.PrecisionOption = "fp32",
    threads: options.ThreadsOption = None,
    n_cpu_moe: options.CpuMoeOption = 0,
    trim: options.TrimOption = False,
    ranks: Annotated[
        int | None,
        options.whole_number("--ranks", help="Processes that share samples and experts (MPI)."),
    ] = None,
    transport: Annotated[str, typer.Option(help="What several ranks talk over.")] = "mpi",
    deadline: Annotated[
        int,
        options.whole_number(
            "--deadline", metavar="SECONDS", help="A rank without progress for so long ends all."
        ),
    ] = int(steps.DEADLINE),
    json: options.JsonOption = None,
) -> None:
    """Runs samples through a model, and validates and times it."""
    request = Request(
        model=model,
        plan=options.chosen_plan(backend, plan),
        n=n,
        validate=validate_outputs,
        warmup=warmup,
        batch_size=batch_size,
        inputs=inputs,
        random_inputs=random_inputs,
        seed=seed,
        answers=answers,
        outputs=outputs,
        precision=precision,
        threads=threads,
        n_cpu_moe=n_cpu_moe,
        trim=trim,
        json=json,
    )
    steps.set_deadline(deadline)
    report = Report(json)
    plugins = installed_plugins()
    job = joined_job(plugins, transport, ranks)
    if job is None and (ranks or 1) > 1:
        prepare(request, plugins, None)  # what is wrong shows here, once, not on every rank
        raise typer.Exit(launched(plugins, transport, ranks or 1, sys.argv[1:]))
    with ending_all_ranks(job):
        verdict = perform(request, report, plugins, job)
        if verdict is not None and not verdict.is_valid:
            raise typer.Exit(1)


@dataclass(frozen=True, slots=True)
class Request:
    """What the command line asks for."""

    model: str
    plan: Plan
    n: int | None
    validate: bool
    warmup: bool
    batch_size: int | None
    inputs: Path | None
    random_inputs: int | None  # tokens of a sample
    seed: int
    answers: Path | None
    outputs: Path | None
    precision: str
    threads: int | None
    n_cpu_moe: int
    trim: bool
    json: str | None


@dataclass(frozen=True, slots=True)
class Prepared:
    """All that can be known, and be wrong, before a weight is read."""

    checkpoint: Checkpoint
    setup: Setup
    inputs: npt.NDArray[np.int32]  # [n, seq_len]
    answers: Path | None
    batch_size: int


def prepare(request: Request, plugins: Plugins, transport: Transport | None) -> Prepared:
    """Everything found and checked; `Lfm2kitError` says what the user must change."""
    checkpoint = options.open_model(request.model)
    world = transport.world if transport is not None else World()
    setup = set_up(
        checkpoint,
        request.plan,
        context=options.context_for(request.precision, request.threads, world),
        n_cpu_moe=request.n_cpu_moe,
        trim=request.trim,
        transport=transport,
        plugins=plugins,
    )
    token_ids = token_ids_of(request, checkpoint)
    if world.rank == 0:  # it alone writes, perhaps where the others' machines have no folder
        check_outputs(request, checkpoint)
    batch_size = request.batch_size or default_batch_size(token_ids.shape[1])
    return Prepared(checkpoint, setup, token_ids, answers_of(request, checkpoint), batch_size)


def token_ids_of(request: Request, checkpoint: Checkpoint) -> npt.NDArray[np.int32]:
    """The ids [n, seq_len] that were asked for: from a file, or random ones."""
    vocab_size = checkpoint.spec.embed_tokens.vocab_size
    if request.random_inputs is not None:
        if request.inputs is not None:
            raise Lfm2kitError("--inputs and --random-inputs: give one of them")
        shape = (request.n or MOST_BY_DEFAULT, request.random_inputs)
        return np.random.default_rng(request.seed).integers(0, vocab_size, shape, dtype=np.int32)
    source = request.inputs or checkpoint.beside("inputs.bin")
    if request.inputs is None and not source.exists():
        raise Lfm2kitError(
            f"there is no {source}; give --inputs FILE, or --random-inputs 16 for random ids"
        )
    token_ids = samples.read_inputs(source)
    token_ids = samples.take(token_ids, request.n or min(len(token_ids), MOST_BY_DEFAULT))
    samples.check_ids(token_ids, vocab_size)
    return token_ids


def check_outputs(request: Request, checkpoint: Checkpoint) -> None:
    """`Lfm2kitError` where the outputs cannot be written, or would take a file's place."""
    if request.outputs is None:
        return
    check_target("--outputs", request.outputs)
    check_no_part("--outputs", request.outputs)
    others = {"--inputs": request.inputs, "--json": request.json, "--model": checkpoint.path}
    for option, path in others.items():
        if path is not None and os.path.realpath(path) == os.path.realpath(request.outputs):
            raise Lfm2kitError(f"--outputs {request.outputs} is {option}'s file as well")


def answers_of(request: Request, checkpoint: Checkpoint) -> Path | None:
    """The answers to compare with, if that was asked for."""
    if not request.validate:
        if request.answers is not None:
            raise Lfm2kitError(f"--answers {request.answers} is for -v, which is not given")
        return None
    answers = request.answers or checkpoint.beside("answers.bin")
    if request.random_inputs is not None:
        raise Lfm2kitError("-v: there are no answers to random inputs; leave one of the two out")
    if not answers.is_file():
        raise Lfm2kitError(f"-v needs answers, and {answers} is not there; give --answers FILE")
    return answers


def perform(
    request: Request, report: Report, plugins: Plugins, transport: Transport | None
) -> Verdict | None:
    """The whole run; what it says is said by rank 0 alone."""
    prepared = prepare(request, plugins, transport)
    is_first = transport is None or transport.world.rank == 0
    if is_first:
        introduce(request, prepared, report, transport)
    model = built(prepared.setup, is_first)
    if request.warmup:
        warm = prepared.inputs[: prepared.batch_size]
        run_samples(model, warm, prepared.batch_size, transport=transport)
    timed = run_timed(model, prepared, transport, is_first)
    if timed.logits is None:
        return None
    steps.step("validating and writing", steps.longest(Work(0, 2 * timed.logits.nbytes)))
    verdict = judge(timed.logits, prepared.answers, request.precision)
    if request.outputs is not None:  # after judging: it may take the place of the answers
        samples.write_outputs(request.outputs, timed.logits)
    conclude(timed.seconds, len(prepared.inputs), verdict, report)
    return verdict


def introduce(
    request: Request, prepared: Prepared, report: Report, transport: Transport | None
) -> None:
    """Says what will run, before it runs: nothing is chosen in silence."""
    n, seq_len = prepared.inputs.shape
    size = prepared.checkpoint.spec.weight_elements()
    ranks = transport.world.size if transport is not None else 1
    chosen = "" if str(request.plan) == str(prepared.setup.plan) else f" ({request.plan})"
    report.fields |= {
        "model": str(prepared.checkpoint.path),
        "parameters": size,
        "backend": str(prepared.setup.plan),
        "precision": request.precision,
        "trim": request.trim,
        "ranks": ranks,
        "samples": n,
        "tokens_per_sample": seq_len,
        "batch_size": prepared.batch_size,
    }
    report.line(f"Model: {prepared.checkpoint.path} ({size / 1e6:.4g} M parameters)")
    trimmed = ", trimmed" if request.trim else ""
    report.line(
        f"Backend: {prepared.setup.plan}{chosen}, {request.precision}{trimmed}, ranks: {ranks}"
    )
    report.line(f"Samples: {n} of {seq_len} tokens, {min(n, prepared.batch_size)} in a batch")
    for note in prepared.setup.notes():
        remark(note)


def built(setup: Setup, is_first: bool) -> LFM2:
    """The model, with a progress bar over the bytes of its weights."""
    total = sum(setup.stored_bytes(leaf) for leaf in setup.placed.leaves())
    with progress("loading", total, "GB", 1e9, visible=is_first) as advance:
        return setup.build(lambda leaf: advance(setup.stored_bytes(leaf)))


def run_timed(
    model: LFM2, prepared: Prepared, transport: Transport | None, is_first: bool
) -> Timed:
    n = len(prepared.inputs)
    with progress("running", n, "samples", visible=is_first) as advance:
        return run_samples(
            model, prepared.inputs, prepared.batch_size, transport=transport, done=advance
        )


def judge(logits: npt.NDArray[np.float32], answers: Path | None, precision: str) -> Verdict | None:
    if answers is None:
        return None
    try:
        expected = samples.read_answers(answers)
    except samples.BadAnswersError as error:
        return nothing_to_compare(len(logits), str(error))
    return validate(logits, expected, precision)


def conclude(seconds: float, n: int, verdict: Verdict | None, report: Report) -> None:
    """The lines that graders grep for, word for word."""
    report.line(f"Elapsed time: {seconds:f} (sec)")
    report.line(f"Throughput: {n / seconds:f} (samples/sec)")
    report.line(f"Peak memory: {peak_memory() / 1e9:.3g} GB")
    report.fields |= {
        "seconds": seconds,
        "samples_per_second": n / seconds,
        "peak_memory_bytes": peak_memory(),
    }
    if verdict is not None:
        for line in verdict.lines():
            report.line(line)
        report.fields["validation"] = asdict(verdict) | {"valid": verdict.is_valid}
    report.write()


def peak_memory() -> int:
    """Bytes: the most that this process has had in memory at once, mapped files included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
