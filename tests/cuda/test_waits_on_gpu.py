"""Waits on a real GPU: for the CPU's choice of experts, and for other ranks, in replays as well.

    python -m pytest -m gpu tests/cuda/test_waits_on_gpu.py

Two ranks share one GPU, which `LFM2KIT_CUDA_SHARED` allows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lfm2kit_cuda.requirements import why_unavailable

from lfm2kit.building.loading import set_up
from lfm2kit.building.options import Options
from lfm2kit.building.results import Checked
from lfm2kit.building.waits import Waits
from lfm2kit.measuring.bench import random_batch
from lfm2kit.profiling import forwards
from lfm2kit.profiling.figures import parts_of
from lfm2kit.profiling.forwards import Profile, Prompt, profiled
from tests.random_model import RANDOM, write_random_model
from tests.records.validating import faults

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable())),
]

A_WHILE = 280  # seconds: kernels may have to be compiled first
LAYERS = range(2, 8)  # with experts
BATCH = random_batch(4, 16, 1024, seed=0)


@pytest.fixture(scope="module")
def hybrid() -> tuple[Any, Profile]:
    """Return the set-up of a hybrid model, and its profile with marks in all blocks."""
    setup, checked, waits = (
        set_up(RANDOM, Options(backend="hybrid")),
        list[Checked](),
        list[Waits](),
    )
    model = setup.build(checked=checked, waits=waits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forwards, "MOST_OVERHEAD", np.inf)
        profile = profiled(model, [*checked, *waits], Prompt(BATCH), repetitions=5)
    assert model.is_captured
    return setup, profile


def test_the_gpu_waits_for_the_choice_of_each_layer(hybrid: tuple[Any, Profile]) -> None:
    names = [f"layers.{layer}.feed_forward.router.choice.wait" for layer in LAYERS]
    for spans in hybrid[1].spans:
        waits = [span for span in spans if span.what.kind == "wait for host"]
        assert [span.name for span in waits] == names
        assert all(span.memory.startswith("lfm2kit_cuda:") for span in waits)
        assert all(0 < span.seconds < 1 for span in waits)


def test_a_wait_lies_between_scores_and_experts_and_counts_once(
    hybrid: tuple[Any, Profile],
) -> None:
    for spans in hybrid[1].spans:
        here = sorted((s for s in spans if s.memory != "host"), key=lambda span: span.begin)
        for before, wait, after in zip(here, here[1:], here[2:], strict=False):
            if wait.what.kind != "wait for host":
                continue
            router = wait.name.removesuffix(".choice.wait")
            assert before.name == f"{router}.scores"
            assert after.name.startswith(router.removesuffix("router"))
            assert before.begin + before.seconds <= wait.begin + 1e-6
            assert wait.begin + wait.seconds <= after.begin + 1e-6
            assert wait.own == wait.seconds


def test_spans_count_from_the_begin_of_the_forward(hybrid: tuple[Any, Profile]) -> None:
    for spans, seconds in zip(hybrid[1].spans, hybrid[1].marked, strict=True):
        assert all(0 <= span.begin < seconds for span in spans)
        assert max(span.begin + span.seconds for span in spans) < 2 * seconds
        assert sum(span.own for span in spans if span.memory != "host") < 1.5 * seconds


def test_waits_are_parts_of_a_profile(hybrid: tuple[Any, Profile]) -> None:
    parts = parts_of(*hybrid, BATCH)
    assert [part.kind for part in parts].count("wait for host") == len(LAYERS)


@pytest.mark.mpi
@pytest.mark.parametrize("exchange", ["device", "host"])
def test_ranks_on_gpus_tell_what_they_wait_for(exchange: str, tmp_path: Path) -> None:
    pytest.importorskip("lfm2kit_mpi", reason="the MPI transport is a distribution of its own")
    model = write_random_model(tmp_path / "model")
    shared = {"CUDA_VISIBLE_DEVICES": "0", "LFM2KIT_CUDA_SHARED": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "lfm2kit", "profile", "--ranks", "2", "-b", "cuda", "-m", str(model),
         "--exchange", exchange, "-n", "4", "-r", "2", "--json", "-"],
        capture_output=True, text=True, timeout=A_WHILE, env={**os.environ, **shared},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert faults(record) == []
    for rank in record["ranks"]:
        kinds = {part["kind"] for part in rank["parts"]}
        assert kinds >= {"exchange", "sending", "wait for ranks"}
        assert ("wait for host" in kinds) == (exchange == "host")
