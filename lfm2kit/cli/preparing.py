"""Finds and checks everything that `lfm2kit run` needs, before a weight is read.

Whatever is wrong with the command line, a file or this machine is an error here, before the work.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lfm2kit import bounds
from lfm2kit.building.capacity import check_room
from lfm2kit.building.loading import Setup, set_up
from lfm2kit.building.options import Options, option
from lfm2kit.building.plan import Plan
from lfm2kit.checkpoint import Checkpoint, check_no_part
from lfm2kit.checkpoint.file_kinds import check_regular, is_of_this_process
from lfm2kit.cli.flags import flag
from lfm2kit.cli.options import JSON, RANKS, TRANSPORT, files_of, open_model
from lfm2kit.cli.ranks import check_size
from lfm2kit.cli.report import Report
from lfm2kit.cli.rewrite_options import settled as settled_rewrites
from lfm2kit.errors import Lfm2kitError, Option
from lfm2kit.measuring import samples
from lfm2kit.measuring.running import default_batch_size
from lfm2kit.outputs.files import check_target
from lfm2kit.outputs.targets import check_apart
from lfm2kit.ranks import fingerprints
from lfm2kit.ranks.agreement import Fact, Facts
from lfm2kit.ranks.joining import facts_of_content, settled_alike
from lfm2kit.ranks.launchers import DEFAULT_TRANSPORT
from lfm2kit.rewrites.recorded_load import LoadRecorder
from lfm2kit.transport import Transport, World

MOST_BY_DEFAULT = 128  # samples: the assignment's largest choice


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A run as the command line asks for it."""

    options: Options
    n: int | None = option(None, "Number of samples to run.", words="all, up to 128", least=1)
    validate: bool = option(
        False, "Compare the outputs with the answers; look at all that blocks return, as --check."
    )
    warmup: bool = option(
        False, "Run a batch before the timed run; twice if the second one is captured."
    )
    batch_size: int | None = option(
        None, "Samples in a forward.", words="as many as make 4096 tokens", least=1
    )
    inputs: Path | None = option(
        None, "File of token ids.", words="inputs.bin beside the model", metavar="FILE"
    )
    random_inputs: int | None = option(
        None, "Run random samples of TOKENS ids instead of a file.", least=1, metavar="TOKENS"
    )
    answers: Path | None = option(
        None, "File of expected logits.", words="answers.bin beside the model", metavar="FILE"
    )
    tolerance: float | None = option(
        None,
        "With -v, the largest difference of a logit from its answer.",
        words="as the precision's grade says",
        metavar="X",
    )
    outputs: Path | None = option(
        None, "Where to write the logits.", words="nowhere", metavar="FILE"
    )
    record_load: Path | None = option(
        None, "Where to write how many tokens chose each expert.", words="nowhere", metavar="FILE"
    )
    ranks: int | None = field(default=None, metadata={"about": RANKS})
    transport: str = field(default=DEFAULT_TRANSPORT, metadata={"about": TRANSPORT})
    json: str | None = field(default=None, metadata={"about": JSON})


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run of which everything is known, and checked, before a weight is read."""

    report: Report
    plan: Plan  # as it was asked for
    checkpoint: Checkpoint
    setup: Setup
    inputs: npt.NDArray[np.int32]  # [n, seq_len]
    answers: Path | None
    batch_size: int
    recorder: LoadRecorder | None


def prepare(request: Request, transport: Transport | None) -> Prepared:
    """Find and check everything; `Lfm2kitError` says what the user must change."""
    world = place_of(transport, request.ranks)
    check_size(transport, request.ranks)
    if transport is not None or (request.ranks or 1) > 1:
        check_shared(request)
    report = Report(request.json if world.rank == 0 else None, "lfm2kit run")
    plan = request.options.chosen_plan()
    checkpoint = open_model(request.options)
    if world.rank == 0:  # it alone writes, perhaps where the others' machines have no folder
        check_outputs(request, report, checkpoint)
    token_ids = token_ids_of(request, checkpoint)
    answers = answers_of(request, checkpoint)
    check_tolerance(request)
    recorder = None if request.record_load is None else LoadRecorder()
    batch_size = request.batch_size or default_batch_size(token_ids.shape[1])
    of_a_rank = -(-len(token_ids) // world.size)
    tokens = min(batch_size, of_a_rank) * token_ids.shape[1]
    setup = set_up(
        checkpoint,
        replace(request.options, check=request.options.check or request.validate),
        world=world,
        transport=transport,
        rewrites=[] if recorder is None else [recorder.rewrite()],
        tokens=tokens,
    )
    return Prepared(report, plan, checkpoint, setup, token_ids, answers, batch_size, recorder)


def place_of(transport: Transport | None, ranks: int | None) -> World:
    """Return this process's place in its job; before there is one, rank 0's on this machine."""
    if transport is not None:
        return transport.world
    return World.of(0, (0,) * (ranks or 1))


def settled(prepared: Prepared, transport: Transport | None) -> Prepared:
    """Return the run that every rank can do together; every rank of a job calls this."""
    if transport is None:
        return prepared
    return replace(prepared, setup=settled_alike(transport, prepared.setup))


def check_shared(request: Request) -> None:
    """Raise `Lfm2kitError` if a path leads to another file in each process of a job."""
    check_same_file(
        {
            **shared_paths(request.options, request.json),
            "--inputs": request.inputs,
            "--answers": request.answers,
            "--outputs": request.outputs,
            "--record-load": request.record_load,
        }
    )


def shared_paths(options: Options, json: str | None) -> dict[str, Path | None]:
    """Return the paths that these options name, by option."""
    return {
        "--model": Path(options.model),
        "--plan": options.plan,
        "--rates": options.rates,
        "--load": options.load,
        "--json": None if json is None else Path(json),
    }


def check_same_file(paths: Mapping[str, Path | None]) -> None:
    """Raise `Lfm2kitError` if a path leads to another file in each process.

    What a rank has open under that number may be its connection to the others.
    """
    for name, path in paths.items():
        if path is not None and is_of_this_process(path):
            raise Lfm2kitError(
                f"{name} {path}: each rank has another file there; give the name of a file"
            )


def token_ids_of(request: Request, checkpoint: Checkpoint) -> npt.NDArray[np.int32]:
    """Return the ids [n, seq_len] that were asked for, from a file or random ones."""
    vocab_size = checkpoint.spec.embed_tokens.vocab_size
    if request.random_inputs is None:
        if request.options.seed is not None and checkpoint.seed is None:
            raise Lfm2kitError(
                f"--seed {request.options.seed} needs --random-inputs, which is not given"
            )
        return _ids_of_file(request, checkpoint, vocab_size)
    if request.inputs is not None:
        raise Lfm2kitError("--inputs and --random-inputs: give only one of them")
    shape = (request.n or MOST_BY_DEFAULT, request.random_inputs)
    bounds.check_tokens(*shape)
    check_samples(shape, vocab_size)
    generator = np.random.default_rng(request.options.seed or 0)
    return generator.integers(0, vocab_size, shape, dtype=np.int32)


def _ids_of_file(
    request: Request, checkpoint: Checkpoint, vocab_size: int
) -> npt.NDArray[np.int32]:
    source = inputs_of(request, checkpoint)
    if request.inputs is None and not source.exists():
        raise Lfm2kitError(
            f"there is no {source}; give --inputs FILE, or --random-inputs 16 for random ids"
        )
    token_ids = samples.read_inputs(source)
    token_ids = samples.take(token_ids, request.n or min(len(token_ids), MOST_BY_DEFAULT))
    check_samples(token_ids.shape, vocab_size)
    token_ids = np.array(token_ids)  # a copy: the file may change
    samples.check_ids(token_ids, vocab_size)
    return token_ids


def check_samples(shape: tuple[int, ...], vocab_size: int) -> None:
    """Raise `Lfm2kitError` if memory cannot hold the ids and the logits of all samples."""
    n, seq_len = shape
    what = f"{n} samples of {seq_len} tokens, and their logits, take"
    check_room(what, 4 * n * (seq_len + vocab_size), "try a smaller -n, or shorter samples")


def inputs_of(request: Request, checkpoint: Checkpoint) -> Path:
    return request.inputs or checkpoint.beside("inputs.bin")


def check_outputs(request: Request, report: Report, checkpoint: Checkpoint) -> None:
    """Raise `Lfm2kitError` if an output cannot be written, or would replace a file that is read.

    `--outputs` may replace the answers, which are read before it is written.
    """
    outputs = {"--outputs": request.outputs, "--record-load": request.record_load}
    given = {name: path for name, path in outputs.items() if path is not None}
    for name, path in given.items():
        check_target(name, path)
    reads = files_of(checkpoint, request.options)
    reads["the inputs"] = [inputs_of(request, checkpoint)]
    outputs["--json"] = report.path
    check_apart(outputs, reads)
    answers = {"the answers": [request.answers or checkpoint.beside("answers.bin")]}
    check_apart({**outputs, "--outputs": None}, answers)
    for name, path in given.items():
        check_no_part(name, path)


def answers_of(request: Request, checkpoint: Checkpoint) -> Path | None:
    """Return the file of answers if `-v` asks for a comparison."""
    if not request.validate:
        if request.answers is not None:
            raise Lfm2kitError(f"--answers {request.answers} needs -v, which is not given")
        return None
    answers = request.answers or checkpoint.beside("answers.bin")
    if request.random_inputs is not None:
        raise Lfm2kitError("-v: there are no answers to random inputs; leave one of the two out")
    if not os.path.exists(answers):
        raise Lfm2kitError(f"-v needs answers, and {answers} does not exist; give --answers FILE")
    check_regular(answers)
    return answers


def check_tolerance(request: Request) -> None:
    """Raise `Lfm2kitError` unless a tolerance is a positive number, and `-v` judges by it."""
    if request.tolerance is None:
        return
    if not 0 < request.tolerance < np.inf:
        raise Lfm2kitError(f"--tolerance {request.tolerance:g}: expected a number above 0")
    if not request.validate:
        raise Lfm2kitError(f"--tolerance {request.tolerance:g} needs -v, which is not given")


# Options that may differ between ranks, or whose results are compared: nodes may have other paths.
NOT_COMPARED = {
    "options",  # each by its own name
    "model",
    "backend",
    "plan",
    "n",
    "batch_size",
    "inputs",
    "load",
    "threads",
    "ranks",
    "rewrites",
}


def passed_over(request: Request, prepared: Prepared) -> Iterator[str]:
    """Yield a sentence for each sample file beside the model that one in `data/` overrides."""
    used = {"inputs": request.random_inputs is None, "answers": prepared.answers is not None}
    for name, is_used in used.items():
        is_chosen = getattr(request, name) is not None
        other = prepared.checkpoint.passed_over(f"{name}.bin")
        if is_used and not is_chosen and other is not None:
            read = prepared.checkpoint.beside(f"{name}.bin")
            yield f"reading {read}, not {other}; give --{name} FILE to choose"


def facts_of(request: Request, prepared: Prepared) -> Facts:
    """Return what all ranks of a job must have in common before they read weights."""
    asked = {**asdict(request), **asdict(request.options)}
    settled = {
        "--backend": prepared.setup.asked,
        **{flag(Option(name)): v for name, v in asked.items() if name not in NOT_COMPARED},
        **settled_rewrites(request.options.rewrites),
        "--seed": request.options.seed or 0,
        "--batch-size": prepared.batch_size,
        "-n": len(prepared.inputs),
        "the inputs' content": fingerprints.digest([prepared.inputs.tobytes()]),
    }
    return {
        **{name: _fact(value) for name, value in settled.items()},
        **facts_of_content(prepared.setup),
    }


def _fact(value: object) -> Fact:
    """Put an option's value into words."""
    if value is None or isinstance(value, bool):
        return Fact("given" if value else "not given")
    return Fact(str(value))
