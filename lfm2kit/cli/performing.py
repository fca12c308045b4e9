"""Performs a prepared `lfm2kit run`: build, run, judge, print, write."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict

import numpy as np
import numpy.typing as npt

from lfm2kit import progress as steps
from lfm2kit.backend import Captures
from lfm2kit.building.byte_counts import size
from lfm2kit.building.load import Load
from lfm2kit.building.loading import Setup
from lfm2kit.building.plugins import Plugins
from lfm2kit.checkpoint import Checkpoint
from lfm2kit.cli.console import BYTES, complain, only_said, progress, remark, write_document
from lfm2kit.cli.flags import told
from lfm2kit.cli.preparing import Prepared, Request, passed_over
from lfm2kit.cli.report import Report
from lfm2kit.errors import TRACEBACK_HINT, Lfm2kitError
from lfm2kit.measuring import samples
from lfm2kit.measuring.running import Timed, run_samples
from lfm2kit.measuring.validate import Verdict, not_finite, nothing_to_compare, validate
from lfm2kit.model import LFM2
from lfm2kit.records.machine import machine_of
from lfm2kit.specs import Work
from lfm2kit.transport import Transport


@np.errstate(all="ignore")  # what is not finite is told once, at the end
def perform(request: Request, prepared: Prepared, transport: Transport | None) -> bool:
    """Do the whole run, and return whether its result is good.  Only rank 0 prints."""
    is_first = transport is None or transport.world.rank == 0
    if is_first:
        introduce(request, prepared, transport)
    samples_at_once = min(len(prepared.inputs), prepared.batch_size)
    tokens = samples_at_once * prepared.inputs.shape[1]
    model = built(prepared.setup, tokens, is_first)
    if request.warmup:
        _warm_up(model, prepared, transport)
    if prepared.recorder is not None:
        prepared.recorder.clear()  # of what ran before the clock
    timed = run_timed(model, prepared, transport, is_first)
    prepared.report.fields["overlap"] = model.overlap.document()
    prepared.report.fields["exchange"] = exchange_of(prepared.setup)
    load = recorded(prepared, transport)
    if timed.logits is None:
        return True
    steps.step("validating and writing", steps.longest(Work(0, 2 * timed.logits.nbytes)))
    verdict = judge(timed.logits, prepared, request.tolerance)
    problem = not_finite(timed.logits)
    prepared.report.fields["finite"] = problem is None
    is_good = problem is None and (verdict is None or verdict.is_valid)
    try:
        conclude(timed, len(prepared.inputs), verdict, prepared.report)
        if problem is not None:
            complain(problem)
    finally:  # whatever becomes of the printed lines
        with only_said(when=not is_good):
            deliver(request, prepared, timed.logits, load)
    return is_good


def _warm_up(model: LFM2, prepared: Prepared, transport: Transport | None) -> None:
    """Run the first batch of every rank, and once more if that is captured then."""
    ranks = transport.world.size if transport is not None else 1
    warm = prepared.inputs[: ranks * prepared.batch_size]
    for _ in range(2 if model.is_captured else 1):
        run_samples(model, warm, prepared.batch_size, transport=transport)


def introduce(request: Request, prepared: Prepared, transport: Transport | None) -> None:
    """Print what was chosen, before it runs."""
    report = prepared.report
    n, seq_len = prepared.inputs.shape
    size = prepared.checkpoint.spec.weight_elements()
    ranks = transport.world.size if transport is not None else 1
    chosen = "" if str(prepared.plan) == str(prepared.setup.plan) else f" ({prepared.plan})"
    report.machine = machine_of(prepared.setup)
    report.fields |= {
        "model": str(prepared.checkpoint.path),
        "parameters": size,
        "weights": weights_of(prepared.checkpoint),
        "backend": str(prepared.setup.plan),
        "precision": prepared.setup.precision_of(prepared.setup.placed),
        "rewrites": [rewrite.name for rewrite in prepared.setup.rewrites],
        "ranks": ranks,
        "groups": prepared.setup.grouping.groups,
        "samples": n,
        "tokens_per_sample": seq_len,
        "batch_size": prepared.batch_size,
    }
    notes = (*prepared.setup.notes(), *not_captured(prepared), *passed_over(request, prepared))
    report.fields["notes"] = list(notes)
    report.line(f"Model: {prepared.checkpoint.path} ({size / 1e6:.4g} M parameters)")
    if prepared.checkpoint.config is None:  # a file of specs names no weights
        report.line(f"Weights: {report.fields['weights']}")
    how = ", ".join([report.fields["precision"], *report.fields["rewrites"]])
    among = f", {prepared.setup.grouping}" if ranks > 1 else ""
    report.line(f"Backend: {prepared.setup.plan}{chosen}, {how}, ranks: {ranks}{among}")
    report.line(f"Samples: {n} of {seq_len} tokens, {min(n, prepared.batch_size)} in a batch")
    for note in notes:
        remark(note)


def exchange_of(setup: Setup) -> dict[str, str | None]:
    """Return what was asked of the exchange, the memory that it is in, and why not another."""
    memories = [offer.memory.name for offer in setup.placed.offers()]
    return {
        "asked": setup.options.exchange,
        "memory": memories[0] if memories else None,
        "why": setup.through_host,
    }


def not_captured(prepared: Prepared) -> Iterator[str]:
    """Yield a sentence if the model is not captured because its load is recorded."""
    setup = prepared.setup
    if prepared.recorder is not None and isinstance(setup.create(setup.plan.default), Captures):
        yield "not captured, and slower: --record-load counts the experts in every call"


def weights_of(checkpoint: Checkpoint) -> str:
    """Say which weights a model has."""
    if checkpoint.seed is not None:
        return f"random, seed {checkpoint.seed}"
    return ", ".join(path.name for path in checkpoint.weight_files())


def built(setup: Setup, tokens: int, is_first: bool = True) -> LFM2:
    """Build the model for forwards of `tokens` tokens, with a bar over the bytes of its weights."""
    total = sum(setup.stored_bytes(leaf) for leaf in setup.placed.leaves())
    with progress("loading", total, BYTES, visible=is_first) as advance:
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
            model,
            prepared.inputs,
            prepared.batch_size,
            transport=transport,
            groups=prepared.setup.grouping.groups,
            done=done,
        )


def judge(
    logits: npt.NDArray[np.float32], prepared: Prepared, tolerance: float | None
) -> Verdict | None:
    if prepared.answers is None:
        return None
    try:
        expected = samples.read_answers(prepared.answers)
    except samples.BadAnswersError as error:
        return nothing_to_compare(len(logits), str(error))
    return validate(logits, expected, prepared.setup.grade, tolerance)


def conclude(timed: Timed, n: int, verdict: Verdict | None, report: Report) -> None:
    """Print the lines that graders search for, word for word."""
    seconds = timed.seconds
    report.line(f"Elapsed time: {seconds:f} (sec)")
    report.line(f"Throughput: {n / seconds:f} (samples/sec)")
    report.line(f"Peak memory: {size(peak_memory())}")
    report.figure("time", "s", [seconds], "lower")
    report.figure("throughput", "samples/s", [n / seconds], "higher")
    report.figure("peak memory", "B", [peak_memory()], "lower")
    if timed.exchanged is not None:
        report.line(timed.exchanged.line(seconds))
        report.fields["exchanged"] = exchanged = timed.exchanged.document(seconds)
        report.figure("sent by all ranks", "B", [sum(exchanged["bytes"])])
    if verdict is not None:
        for line in verdict.lines():
            report.line(line)
        report.fields["validation"] = asdict(verdict) | {"valid": verdict.is_valid}
        report.figure("largest difference", "", [verdict.max_difference])


def recorded(prepared: Prepared, transport: Transport | None) -> Load | None:
    """Return the load of the timed run if it is asked for; every rank calls this."""
    if prepared.recorder is None:
        return None
    checkpoint = prepared.checkpoint
    return prepared.recorder.load(checkpoint.path.name, checkpoint.spec, transport)


def deliver(
    request: Request, prepared: Prepared, logits: npt.NDArray[np.float32], load: Load | None
) -> None:
    """Write the files that were asked for and tell the plugins, even if one of these fails."""
    failures: list[Lfm2kitError] = []
    tasks: list[Callable[[], None]] = [
        lambda: write_outputs(request, logits),
        lambda: write_load(request, load),
        prepared.report.write,
        lambda: tell(prepared.setup.plugins, prepared.report),
    ]
    for task in tasks:
        try:
            task()
        except Lfm2kitError as error:
            failures.append(error)
    if failures:
        raise Lfm2kitError("; ".join(map(told, failures))) from failures[0]


def tell(plugins: Plugins, report: Report) -> None:
    """Tell the plugins that the run has ended; raise `Lfm2kitError` if any of them fails."""
    raised = plugins.run_ended(report.record())
    said = [f"plugin '{name}' failed after the run: {_why(e)}" for name, e in raised.items()]
    if said:
        raise Lfm2kitError("; ".join(said)) from next(iter(raised.values()))


def _why(error: Exception) -> str:
    if isinstance(error, Lfm2kitError):
        return told(error)
    return f"{type(error).__name__}: {error}{TRACEBACK_HINT}"


def write_outputs(request: Request, logits: npt.NDArray[np.float32]) -> None:
    if request.outputs is None:
        return
    before = samples.samples_in(request.outputs)
    samples.write_outputs(request.outputs, logits, remark)
    if before > len(logits):
        remark(f"{request.outputs} held {before} samples before, and now holds {len(logits)}")


def write_load(request: Request, load: Load | None) -> None:
    if request.record_load is not None and load is not None:
        write_document(request.record_load, load.document())


def peak_memory() -> int:
    """Return the largest memory of this process so far in bytes, mapped files included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
