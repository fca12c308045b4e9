"""A program of a user beside launchers: a job of one rank, and copies that are refused."""

from __future__ import annotations

import importlib
import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest

from lfm2kit import Batch, joined_job, load_model
from lfm2kit.building.load import Load, unused
from lfm2kit.building.loading import find_model, set_up
from lfm2kit.building.options import Options
from lfm2kit.checkpoint import open_checkpoint
from lfm2kit.errors import BUG, USER_ERROR, Lfm2kitError, Option
from lfm2kit.process.streams import READER_GONE, ReaderGone, StdoutFailed
from lfm2kit.ranks.groups import Grouping
from lfm2kit.ranks.joining import Alone, facts_of
from lfm2kit.ranks.reasons import reason
from lfm2kit.rewrites.recorded_load import LoadRecorder
from lfm2kit.testing import check_exchange, check_transport
from lfm2kit.transport import World
from tests.random_model import RANDOM

COPIES = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for launcher in importlib.import_module("lfm2kit.ranks.launchers").LAUNCHERS:
        for variable in (launcher.rank, launcher.size):
            if variable is not None:
                monkeypatch.delenv(variable, raising=False)


def test_a_process_alone_is_a_job_of_one_rank() -> None:
    check_transport(Alone())
    check_exchange(Alone())
    with joined_job() as job:
        assert job.world == World()
        model = load_model("tiny", "reference", job=job)
        vocab_size = model.spec.lm_head.vocab_size
        assert model.logits(Batch.of_sequences([[1, 2]])).shape == (1, vocab_size)


def test_what_is_raised_alone_reaches_the_user() -> None:
    with pytest.raises(SystemExit, match="5"), joined_job():
        raise SystemExit(5)


def test_copies_do_not_load_a_model_each_unless_they_are_meant_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in COPIES.items():
        monkeypatch.setenv(name, value)
    says = r"srun started 4 processes \(SLURM_STEP_NUM_TASKS=4\), and each would load the whole"
    with pytest.raises(Lfm2kitError, match=says):
        load_model("tiny", "reference")
    assert load_model("tiny", "reference", independent=True).spec.layers


def test_a_rank_of_a_job_is_not_independent() -> None:
    with pytest.raises(Lfm2kitError, match=r"job and independent=True: .* give only one of them"):
        load_model("tiny", "reference", job=Alone(), independent=True)


def test_copies_that_are_not_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lfm2kit_mpi", reason="the default transport")
    for name, value in COPIES.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Lfm2kitError, match="but not as ranks of one job"), joined_job():
        pass


@pytest.mark.parametrize("job", ["mpi", 2, True])
def test_what_is_no_job_is_refused_with_what_to_give(job: object) -> None:
    with pytest.raises(Lfm2kitError, match=rf"job={job!r}: expected a job, such as") as refused:
        load_model("tiny", job=job)  # type: ignore[arg-type]
    assert "\n" not in str(refused.value)


def test_an_unknown_transport_is_named() -> None:
    with pytest.raises(Lfm2kitError, match="unknown transport 'pigeon'"), joined_job("pigeon"):
        pass


def test_ranks_compare_what_a_load_says_and_not_where_it_is(tmp_path: Path) -> None:
    """Other loads would make them wait for each other at different places."""
    checkpoint = open_checkpoint(find_model("tiny"), [])
    layers = [
        one._replace(counts=(one.num_experts_per_tok,) * len(one.counts))
        for one in unused(checkpoint.spec)
    ]
    hidden_size, tokens = checkpoint.spec.embed_tokens.hidden_size, len(layers[0].counts)
    even = Load("tiny", hidden_size, tokens, tuple(layers))
    a, b, *others = layers[0].counts
    other = replace(even, layers=(layers[0]._replace(counts=(a + 1, b - 1, *others)), *layers[1:]))
    facts = []
    for name, load in (("a", even), ("b", even), ("a", other)):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(load.document()))
        options = Options(backend="reference", load=path, parallel="ep")
        facts.append(facts_of(set_up(checkpoint, options, world=World.of(0, (0, 0)))))
    assert facts[0] == facts[1]
    assert {name for name, fact in facts[2].items() if fact != facts[0][name]} == {"the load"}


def test_a_set_up_is_made_again_with_the_rewrites_that_it_was_given() -> None:
    rewrite, options = LoadRecorder().rewrite(), Options(backend="reference")
    setup = set_up(RANDOM, options, world=World.of(1, (0, 0)), rewrites=[rewrite])
    again = setup.again(grouping=Grouping(((0,), (1,))), through_host="it is told to")
    assert (setup.group, again.group) == ((0, 1), (1,))
    assert again.rewrites[-1] is setup.rewrites[-1] is rewrite
    assert again.through_host == "it is told to"


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (Lfm2kitError(Option("threads", 8), ": 4 cores"), USER_ERROR, "threads=8: 4 cores"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError("no 8 GB"), USER_ERROR, "out of memory (MemoryError: no 8 GB)"),
        (ReaderGone(), READER_GONE, "nobody reads its output any more"),
        (
            StdoutFailed(OSError(28, "No space left on device")),
            USER_ERROR,
            "stdout: No space left on device; the result could not be printed",
        ),
        (SystemExit(4), BUG, "sys.exit(4) was called"),
        (KeyError("w1"), BUG, "KeyError: 'w1'"),
        (ValueError("one\ntwo"), BUG, "ValueError: one"),
        (AssertionError(), BUG, "AssertionError"),
    ],
)
def test_what_a_rank_raises_has_an_exit_code_and_a_sentence(
    error: BaseException, code: int, sentence: str
) -> None:
    assert reason(error) == (code, sentence)


class Job(Alone):
    """A transport that records how its rank ended."""

    ended: tuple[object, ...] = ()

    def finish(self, exit_code: int) -> None:
        self.ended = (exit_code,)

    def abort(self, exit_code: int, reason: str, details: str = "") -> NoReturn:
        self.ended = (exit_code, reason, "Traceback" in details)
        raise SystemExit(exit_code)


@pytest.mark.parametrize(
    ("error", "ended"),
    [
        (None, (0,)),
        (SystemExit(5), (5,)),
        (Lfm2kitError("no such file"), (USER_ERROR, "no such file", False)),
        (KeyError("w1"), (BUG, "KeyError: 'w1'", True)),
    ],
)
def test_how_a_program_ends_on_a_rank_is_told_to_the_others(
    error: BaseException | None, ended: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job()
    monkeypatch.setattr("lfm2kit.ranks.joining._may_be_a_rank", lambda transport: True)
    monkeypatch.setattr(
        "lfm2kit.ranks.joining.find_transport", lambda name: SimpleNamespace(launcher="a launcher")
    )
    monkeypatch.setattr("lfm2kit.ranks.joining.connected", lambda launcher: job)
    with suppress(SystemExit), joined_job():
        if error is not None:
            raise error
    assert job.ended == ended
