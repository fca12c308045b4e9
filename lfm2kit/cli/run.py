"""`lfm2kit run`: samples in, logits out, validated and timed.  The graded command."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import typer

from lfm2kit import bounds, fingerprints, samples
from lfm2kit import progress as steps
from lfm2kit.agreement import Fact, Facts
from lfm2kit.capacity import check_room
from lfm2kit.checkpoint import Checkpoint, check_no_part
from lfm2kit.cli import options
from lfm2kit.cli.console import Report, complain, only_said, progress, remark
from lfm2kit.cli.ranks import DEFAULT_TRANSPORT, agreed, ending_all_ranks, joined_job, launched
from lfm2kit.errors import WRONG_RESULT, Lfm2kitError
from lfm2kit.file_kinds import check_regular
from lfm2kit.files import check_target
from lfm2kit.loading import Setup, set_up
from lfm2kit.model import LFM2
from lfm2kit.plan import Plan
from lfm2kit.plugins import installed_plugins
from lfm2kit.running import Timed, default_batch_size, run_samples
from lfm2kit.specs import Work
from lfm2kit.targets import check_apart
from lfm2kit.transport import Transport, World
from lfm2kit.validate import Verdict, not_finite, nothing_to_compare, validate

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
    seed: Annotated[
        int, options.whole_number("--seed", least=0, most=bounds.SEED, help="Of the random ids.")
    ] = 0,
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
    transport: Annotated[
        str, typer.Option(help="What several ranks talk over.")
    ] = DEFAULT_TRANSPORT,
    independent: Annotated[
        bool,
        typer.Option("--independent", help="Run alone, though a launcher started several of me."),
    ] = False,
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
        backend=backend,
        plan=plan,
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
        ranks=ranks,
        transport=transport,
        json=json,
    )
    steps.set_deadline(deadline)
    job = None if independent else joined_job(transport)
    with ending_all_ranks(job):
        # Without a job yet, what is wrong shows here: once, not on every rank.
        prepared = agreed(job, lambda: prepare(request, job), lambda p: facts_of(request, p))
        if job is None and (ranks or 1) > 1:
            raise typer.Exit(launched(transport, ranks or 1, sys.argv[1:]))
        if not perform(request, prepared, job):
            raise typer.Exit(WRONG_RESULT)


@dataclass(frozen=True, slots=True)
class Request:
    """What the command line asks for."""

    model: str
    backend: str | None
    plan: Path | None
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
    ranks: int | None
    transport: str
    json: str | None


# What may differ between ranks, or is compared by what comes of it: a path may be a node's own.
NOT_COMPARED = {"model", "backend", "plan", "n", "batch_size", "inputs", "threads", "ranks"}


@dataclass(frozen=True, slots=True)
class Prepared:
    """All that can be known, and be wrong, before a weight is read."""

    report: Report
    plan: Plan  # as it was asked for
    checkpoint: Checkpoint
    setup: Setup
    inputs: npt.NDArray[np.int32]  # [n, seq_len]
    answers: Path | None
    batch_size: int


def prepare(request: Request, transport: Transport | None) -> Prepared:
    """Everything found and checked; `Lfm2kitError` says what the user must change."""
    world = transport.world if transport is not None else World()
    if transport is not None and request.ranks not in (None, world.size):
        raise Lfm2kitError(
            f"--ranks {request.ranks}, but this job has {world.size}; leave --ranks out here"
        )
    report = Report(request.json if world.rank == 0 else None)
    plan = options.chosen_plan(request.backend, request.plan)
    checkpoint = options.open_model(request.model)
    if world.rank == 0:  # it alone writes, perhaps where the others' machines have no folder
        check_outputs(request, report, checkpoint)
    token_ids = token_ids_of(request, checkpoint)
    answers = answers_of(request, checkpoint)
    setup = set_up(
        checkpoint,
        plan,
        context=options.context_for(request.precision, request.threads, world),
        n_cpu_moe=request.n_cpu_moe,
        trim=request.trim,
        transport=transport,
        plugins=installed_plugins(),
    )
    batch_size = request.batch_size or default_batch_size(token_ids.shape[1])
    return Prepared(report, plan, checkpoint, setup, token_ids, answers, batch_size)


def facts_of(request: Request, prepared: Prepared) -> Facts:
    """What all ranks of a job must have in common, before one of them reads its weights."""
    asked = {name: v for name, v in asdict(request).items() if name not in NOT_COMPARED}
    settled = {
        "--backend": prepared.setup.plan,
        **{f"--{name.replace('_', '-')}": value for name, value in asked.items()},
        "--batch-size": prepared.batch_size,
        "-n": len(prepared.inputs),
        "the inputs' content": fingerprints.digest([prepared.inputs.tobytes()]),
    }
    return {
        **{name: _fact(value) for name, value in settled.items()},
        **fingerprints.of_environment(),
        **fingerprints.of_model(prepared.checkpoint),
        **fingerprints.of_code(prepared.setup.plugins),
    }


def _fact(value: object) -> Fact:
    """An option's value in words that suit a sentence."""
    if value is None or isinstance(value, bool):
        return Fact("given" if value else "not given")
    return Fact(str(value))


def token_ids_of(request: Request, checkpoint: Checkpoint) -> npt.NDArray[np.int32]:
    """The ids [n, seq_len] that were asked for: from a file, or random ones."""
    vocab_size = checkpoint.spec.embed_tokens.vocab_size
    if request.random_inputs is not None:
        if request.inputs is not None:
            raise Lfm2kitError("--inputs and --random-inputs: give one of them")
        shape = (request.n or MOST_BY_DEFAULT, request.random_inputs)
        bounds.check_tokens(*shape)
        check_samples(shape, vocab_size)
        return np.random.default_rng(request.seed).integers(0, vocab_size, shape, dtype=np.int32)
    source = inputs_of(request, checkpoint)
    if request.inputs is None and not source.exists():
        raise Lfm2kitError(
            f"there is no {source}; give --inputs FILE, or --random-inputs 16 for random ids"
        )
    token_ids = samples.read_inputs(source)
    token_ids = samples.take(token_ids, request.n or min(len(token_ids), MOST_BY_DEFAULT))
    check_samples(token_ids.shape, vocab_size)
    token_ids = np.array(token_ids)  # no view of a file, which may change
    samples.check_ids(token_ids, vocab_size)
    return token_ids


def check_samples(shape: tuple[int, ...], vocab_size: int) -> None:
    """`Lfm2kitError` where memory cannot hold the ids and the logits of all samples."""
    n, seq_len = shape
    what = f"{n} samples of {seq_len} tokens, and their logits, take"
    check_room(what, 4 * n * (seq_len + vocab_size), "try a smaller -n, or shorter samples")


def inputs_of(request: Request, checkpoint: Checkpoint) -> Path:
    return request.inputs or checkpoint.beside("inputs.bin")


def check_outputs(request: Request, report: Report, checkpoint: Checkpoint) -> None:
    """`Lfm2kitError` where the outputs cannot be written, or would take a file's place.

    `--outputs` may take the place of the answers, which are read before it is written.
    """
    if request.outputs is not None:
        check_target("--outputs", request.outputs)
        check_no_part("--outputs", request.outputs)
    reads = options.files_of(checkpoint, request.plan)
    reads["the inputs"] = [inputs_of(request, checkpoint)]
    check_apart({"--outputs": request.outputs, "--json": report.path}, reads)
    report.check_apart({"the answers": [request.answers or checkpoint.beside("answers.bin")]})


def answers_of(request: Request, checkpoint: Checkpoint) -> Path | None:
    """The answers to compare with, if that was asked for."""
    if not request.validate:
        if request.answers is not None:
            raise Lfm2kitError(f"--answers {request.answers} is for -v, which is not given")
        return None
    answers = request.answers or checkpoint.beside("answers.bin")
    if request.random_inputs is not None:
        raise Lfm2kitError("-v: there are no answers to random inputs; leave one of the two out")
    if not os.path.exists(answers):
        raise Lfm2kitError(f"-v needs answers, and {answers} is not there; give --answers FILE")
    check_regular(answers)
    return answers


@np.errstate(all="ignore")  # what is not finite is told once, at the end
def perform(request: Request, prepared: Prepared, transport: Transport | None) -> bool:
    """The whole run, and whether its result is good; what it says is said by rank 0 alone."""
    is_first = transport is None or transport.world.rank == 0
    if is_first:
        introduce(request, prepared, transport)
    model = built(prepared, is_first)
    if request.warmup:
        warm = prepared.inputs[: prepared.batch_size]
        run_samples(model, warm, prepared.batch_size, transport=transport)
    timed = run_timed(model, prepared, transport, is_first)
    if timed.logits is None:
        return True
    steps.step("validating and writing", steps.longest(Work(0, 2 * timed.logits.nbytes)))
    verdict = judge(timed.logits, prepared.answers, request.precision)
    problem = not_finite(timed.logits)
    prepared.report.fields["finite"] = problem is None
    is_good = problem is None and (verdict is None or verdict.is_valid)
    try:
        conclude(timed.seconds, len(prepared.inputs), verdict, prepared.report)
        if problem is not None:
            complain(problem)
    finally:  # whatever becomes of the printed lines
        with only_said(when=not is_good):
            deliver(request, timed.logits, prepared.report)
    return is_good


def introduce(request: Request, prepared: Prepared, transport: Transport | None) -> None:
    """Says what will run, before it runs: nothing is chosen in silence."""
    report = prepared.report
    n, seq_len = prepared.inputs.shape
    size = prepared.checkpoint.spec.weight_elements()
    ranks = transport.world.size if transport is not None else 1
    chosen = "" if str(prepared.plan) == str(prepared.setup.plan) else f" ({prepared.plan})"
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


def built(prepared: Prepared, is_first: bool) -> LFM2:
    """The model, with a progress bar over the bytes of its weights."""
    setup, (n, seq_len) = prepared.setup, prepared.inputs.shape
    tokens = min(n, prepared.batch_size) * seq_len
    total = sum(setup.stored_bytes(leaf) for leaf in setup.placed.leaves())
    with progress("loading", total, "GB", 1e9, visible=is_first) as advance:
        return setup.build(lambda leaf: advance(setup.stored_bytes(leaf)), tokens=tokens)


def run_timed(
    model: LFM2, prepared: Prepared, transport: Transport | None, is_first: bool
) -> Timed:
    n, model_files = len(prepared.inputs), prepared.checkpoint.files_of("", model.placed.spec)
    with progress("running", n, "samples", visible=is_first) as advance:

        def done(samples: int) -> None:
            model_files.check_unchanged()  # blocks may still read them
            advance(samples)

        return run_samples(
            model, prepared.inputs, prepared.batch_size, transport=transport, done=done
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


def deliver(request: Request, logits: npt.NDArray[np.float32], report: Report) -> None:
    """Writes the files that were asked for; one that fails does not keep the other back."""
    failures: list[str] = []
    writes: list[Callable[[], None]] = [lambda: write_outputs(request, logits), report.write]
    for write in writes:
        try:
            write()
        except Lfm2kitError as error:
            failures.append(str(error))
    if failures:
        raise Lfm2kitError("; ".join(failures))


def write_outputs(request: Request, logits: npt.NDArray[np.float32]) -> None:
    if request.outputs is not None:
        samples.write_outputs(request.outputs, logits, remark)


def peak_memory() -> int:
    """Bytes: the most that this process has had in memory at once, mapped files included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
