"""Real MPI jobs: the bits of one process, and what is refused before any rank starts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfm2kit.building.loading import EMBEDDED, set_up
from lfm2kit.building.options import Options
from lfm2kit.building.rank_rates import ExchangeKey
from lfm2kit.building.rates import read_calibration
from lfm2kit.checkpoint import open_checkpoint
from lfm2kit.checkpoint.spec_files import spec_text
from lfm2kit.measuring import samples
from lfm2kit.measuring.running import run_samples
from lfm2kit.ranks.groups import Grouping
from lfm2kit.simulating.jobs import Job, Layout
from lfm2kit.simulating.routing import Routing, RoutingRecorder
from lfm2kit.transport import ExchangeCounts
from tests.core.small import small_spec
from tests.mpi.test_faults import LETS_ANYONE_RUN
from tests.records.validating import faults

pytest.importorskip("lfm2kit_mpi", reason="the MPI transport is a distribution of its own")

from lfm2kit_mpi.launcher import find_mpiexec

pytestmark = pytest.mark.mpi
LFM2KIT = [sys.executable, "-m", "lfm2kit"]
A_WHILE = 120  # seconds: a job that has not ended by then hangs


def lfm2kit(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # One thread a rank: tests share two cores.
    variables = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **environment}
    return subprocess.run(
        [*LFM2KIT, *arguments], capture_output=True, text=True, timeout=A_WHILE, env=variables
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return what one process computes with the reference, which starts fastest."""
    return logits_of("reference", tmp_path_factory.mktemp("alone") / "outputs.bin")


def logits_of(backend: str, path: Path) -> Any:
    done = lfm2kit("run", "-n", "21", "--backend", backend, "--outputs", str(path))
    assert done.returncode == 0, done.stderr
    return samples.read_answers(path)


@pytest.fixture(scope="module")
def routing() -> Routing:
    """Return the experts that the samples of `alone` choose."""
    recorder = RoutingRecorder()
    tiny = open_checkpoint(EMBEDDED / "tiny", [])
    built = set_up(tiny, Options(backend="reference"), rewrites=[recorder.rewrite()]).build()
    token_ids = samples.read_inputs(EMBEDDED / "tiny" / "inputs.bin")[:21]
    run_samples(built, token_ids, len(token_ids))
    return recorder.routing(token_ids.shape[1])


def calculated(routing: Routing, groups: list[list[int]]) -> list[Any]:
    """Return what the exchanges of these groups count by layer, for batches of 4 of 21 samples."""
    spec = open_checkpoint(EMBEDDED / "tiny", []).spec
    grouping = Grouping(tuple(map(tuple, groups)))
    nodes = [0] * sum(map(len, groups))
    counts = Job.of(spec, Layout(nodes, grouping, 4), 21).counts(routing)
    return [[summed(rank[layer]) for rank in counts] for layer in routing.layers if counts[0]]


def summed(counts: ExchangeCounts) -> list[int]:
    legs = counts.counts, counts.dispatch, counts.combine
    return [n for leg in legs for n in (leg.messages, leg.rows, leg.bytes, leg.header_bytes)]


# MPICH then takes even and odd ranks for those of two machines.
TWO_MACHINES = {"MPIR_CVAR_ODD_EVEN_CLIQUES": "1"}


@pytest.mark.parametrize(
    ("backend", "ranks", "more", "environment", "groups"),
    [
        ("cpu_simd", 3, [], {}, [[0, 1, 2]]),
        pytest.param("cpu_simd", 4, [], {}, [[0, 1, 2, 3]], marks=pytest.mark.long),
        pytest.param("reference", 4, [], TWO_MACHINES, [[0, 2], [1, 3]], marks=pytest.mark.long),
        ("reference", 2, ["--parallel", "dp"], {}, [[0], [1]]),
        pytest.param("cpu_simd", 2, ["--parallel", "dp"], {}, [[0], [1]], marks=pytest.mark.long),
    ],
    ids=["3", "4", "4-on-two-machines", "2-each-with-all-experts", "2-of-cpu_simd"],
)
def test_the_logits_of_several_ranks_have_the_bits_of_one(
    backend: str,
    ranks: int,
    more: list[str],
    environment: dict[str, str],
    groups: list[list[int]],
    alone: Any,
    routing: Routing,
    tmp_path: Path,
) -> None:
    """And what the ranks send is what follows from the routing."""
    mpi = subprocess.run([find_mpiexec(), "--version"], capture_output=True, text=True).stdout
    if environment and "HYDRA" not in mpi:
        pytest.skip("only MPICH can be told that ranks are on several machines")
    path = tmp_path / "outputs.bin"
    done = lfm2kit(
        "run", "-v", "-n", "21", "--ranks", str(ranks), "--backend", backend,
        "--batch-size", "4", "--threads", "1", "--outputs", str(path), "--json", "-", *more,
        **environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert faults(record) == []
    assert (record["ranks"], record["groups"]) == (ranks, groups)
    for layer in record["exchanged"]["layers"]:
        assert sum(layer["rows_by_expert"]) == sum(layer["rows_by_rank"]) == 21 * 16 * 4
    if not record["overlap"]["is_on"]:  # pieces have more messages
        assert [by_rank(layer) for layer in record["exchanged"]["layers"]] == calculated(
            routing, groups
        )
    assert ("of the time waiting for others" in done.stderr) == any(len(g) > 1 for g in groups)
    assert "VALID" in done.stderr.splitlines()
    expected = alone if backend == "reference" else logits_of(backend, tmp_path / "alone.bin")
    np.testing.assert_array_equal(samples.read_answers(path), expected)


def test_a_profile_tells_what_ranks_wait_for_each_other(tmp_path: Path) -> None:
    html, trace = tmp_path / "page.html", tmp_path / "trace.json"
    done = lfm2kit(
        "profile", "--ranks", "2", "-b", "reference", "-n", "3", "--seq-len", "4", "-r", "2",
        "--html", str(html), "--trace", str(trace), "--json", "-",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "a forward of 3 samples of 4 tokens on 2 ranks takes" in done.stderr
    record = json.loads(done.stdout)
    assert faults(record) == []
    assert [(one["rank"], one["samples"]) for one in record["ranks"]] == [(0, 1), (1, 2)]
    assert {kind["kind"] for kind in record["kinds"]} >= {"exchange", "sending", "wait for ranks"}
    for layer, rows in record["rank_loads"].items():
        assert sum(rows) == sum(record["expert_loads"][layer]) == 3 * 4 * 4
    assert 1 <= record["rows_max_over_mean"] <= 2
    pids = {event["pid"] for event in json.loads(trace.read_text())["traceEvents"]}
    assert pids == {1, 2}
    assert "rank 1, host" in html.read_text(encoding="utf-8")


def by_rank(layer: dict[str, Any]) -> list[list[int]]:
    names = ("messages", "rows", "bytes", "header_bytes")
    legs = [layer[leg][name] for leg in ("counts", "dispatch", "combine") for name in names]
    return [list(of_rank) for of_rank in zip(*legs, strict=True)]


@pytest.mark.parametrize("trim", [[], pytest.param(["--trim"], marks=pytest.mark.long)])
def test_more_ranks_than_samples_leave_some_without_any(
    trim: list[str], alone: Any, tmp_path: Path
) -> None:
    path = tmp_path / "outputs.bin"
    done = lfm2kit(
        "run", "-n", "1", "--ranks", "2", "--backend", "reference", "--outputs", str(path), *trim
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(samples.read_answers(path), alone[:1])


@pytest.mark.long
def test_trimmed_layers_have_the_same_bits_on_several_ranks(alone: Any, tmp_path: Path) -> None:
    path = tmp_path / "outputs.bin"
    done = lfm2kit(
        "run", "-n", "21", "--ranks", "2", "--backend", "reference", "--batch-size", "4", "--trim",
        "--outputs", str(path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(samples.read_answers(path), alone)


@pytest.mark.long
def test_a_load_that_ranks_have_recorded_places_experts_for_ranks(tmp_path: Path) -> None:
    """It is what one process records; by it, rows are more even, and the answers are right."""
    files = [tmp_path / name for name in ("one.json", "ranks.json", "before.json", "after.json")]
    one, recorded, before, after = map(str, files)
    run = ("run", "-n", "21", "--backend", "reference")
    ranks = (*run, "-v", "--ranks", "3", "--threads", "1")
    for arguments in (
        (*run, "--record-load", one),
        (*ranks, "--record-load", recorded, "--json", before),
        (*ranks, "--load", recorded, "--replicate-experts", "2", "--json", after),
    ):
        done = lfm2kit(*arguments)
        assert done.returncode == 0, done.stderr
    of_one, of_ranks = (json.loads(path.read_text()) for path in files[:2])
    assert [len(layer.pop("ranks")) for layer in of_ranks["layers"]] == [3] * len(of_one["layers"])
    assert of_ranks == of_one
    even, uneven = (
        json.loads(path.read_text())["exchanged"]["rows_max_over_mean"] for path in files[:1:-1]
    )
    assert even < 1.1 < uneven


@pytest.mark.parametrize(
    ("n", "trim"),
    [(21, ["--trim"]), *(pytest.param(n, [], marks=pytest.mark.long) for n in (21, 1))],
)
def test_overlapped_forwards_have_the_same_bits(
    n: int, trim: list[str], alone: Any, tmp_path: Path
) -> None:
    path = tmp_path / "outputs.bin"
    done = lfm2kit(
        "run", "-n", str(n), "--ranks", "2", "--backend", "reference", "--batch-size", "5",
        "--threads", "1", "--overlap", "on", "--outputs", str(path), "--json", "-", *trim,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["overlap"] == {"asked": "on", "is_on": True, "why": None, "share": None}
    forwards = -(-(n + 1) // 10)
    for layer in record["exchanged"]["layers"]:
        assert layer["counts"]["messages"] == [2 * forwards] * 2
    np.testing.assert_array_equal(samples.read_answers(path), alone[:n])


def test_ranks_measure_together_and_one_of_them_writes_the_rates(tmp_path: Path) -> None:
    path, model = tmp_path / "rates.json", tmp_path / "small.toml"
    model.write_text(spec_text(small_spec()))
    done = lfm2kit(
        "calibrate", "-m", str(model), "--ranks", "2", "--backend", "reference", "--threads", "1",
        "--output", str(path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 ranks on one machine") == 1
    rates = read_calibration(path)
    assert [one.key for one in rates.exchanges] == [ExchangeKey(2, 1)]
    assert rates.machine["ranks"] == "2"
    wrong = lfm2kit("calibrate", "--ranks", "2", "--independent")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)


@pytest.mark.long
def test_ranks_that_cannot_exchange_past_the_host_say_so_once() -> None:
    done = lfm2kit(
        "run", "-n", "4", "--ranks", "2", "--backend", "reference", "--exchange", "device"
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert "--exchange device: neither the transport nor a memory of the plan" in done.stderr
    assert "try --exchange auto" in done.stderr


@pytest.mark.long
def test_a_plan_with_several_backends_works_across_ranks() -> None:
    done = lfm2kit(
        "run", "-v", "-n", "8", "--ranks", "2", "--backend", "reference,2-4.moe=cpu_simd"
    )
    assert done.returncode == 0, done.stderr
    assert "VALID" in done.stdout.splitlines()


def test_ranks_that_would_swamp_the_machine_are_refused_but_in_an_allocation() -> None:
    cores = os.cpu_count() or 1
    done = lfm2kit("run", "-n", "1", "--ranks", str(8 * cores + 1))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"this machine has {cores} cores" in done.stderr
    wrong = lfm2kit("run", "-n", "10000", "--ranks", str(8 * cores + 1), SLURM_JOB_ID="1")
    assert "cores" not in wrong.stderr


def test_what_is_wrong_is_said_once_before_any_rank_starts() -> None:
    done = lfm2kit("run", "--ranks", "3", "-n", "100000")
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1


def test_a_wrong_result_of_several_ranks_has_the_exit_code_of_one(tmp_path: Path) -> None:
    answers = tmp_path / "answers.bin"
    right = samples.read_answers(EMBEDDED / "tiny" / "answers.bin")
    samples.write_outputs(answers, np.zeros_like(right[:8]))
    done = lfm2kit(
        "run", "-v", "-n", "8", "--ranks", "2", "--backend", "reference", "--answers", str(answers)
    )
    assert done.returncode == 1, done.stderr
    assert "INVALID" in done.stdout.splitlines()


WITHOUT_SYS = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /sys && exec "$@"', "sh"]


@pytest.mark.parametrize(
    "is_ours", [True, pytest.param(False, marks=pytest.mark.long)], ids=["--ranks", "mpiexec"]
)
def test_what_c_libraries_print_stays_out_of_the_result(is_ours: bool) -> None:
    """MPI's libraries complain of a container without /sys, and do so on stdout."""
    if shutil.which("unshare") is None or subprocess.run([*WITHOUT_SYS, "true"]).returncode != 0:
        pytest.skip("no mounts of one's own here")
    launcher = [] if is_ours else [find_mpiexec(), "-n", "2"]
    arguments = ["run", "-n", "2", "--backend", "reference", "--json", "-"]
    done = subprocess.run(
        [*WITHOUT_SYS, *launcher, *LFM2KIT, *arguments, *(["--ranks", "2"] if is_ours else [])],
        capture_output=True, text=True, timeout=A_WHILE, env=os.environ | LETS_ANYONE_RUN,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ranks"] == 2


def test_the_record_of_a_transports_check_is_as_its_schema_says() -> None:
    done = lfm2kit("transports", "check", "mpi", "--only", "places", "--json", "-")
    assert (done.returncode, faults(json.loads(done.stdout))) == (0, [])


@pytest.mark.long
def test_the_transport_passes_its_own_conformance_check() -> None:
    ids = ["exchange", "exit-code", "abort"]
    done = lfm2kit("transports", "check", "mpi", "--only", ",".join(ids), "--json", "-")
    assert done.returncode == 0, done.stdout
    results = json.loads(done.stdout)["results"]
    assert [(r["id"], r["verdict"]) for r in results] == [(name, "passed") for name in ids]
    assert "only through the host's memory" in results[0]["detail"]


def test_a_check_inside_a_job_is_refused_in_one_line() -> None:
    done = lfm2kit("transports", "check", "mpi", PMI_SIZE="2", PMI_RANK="0")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "this is a rank of a job of 2; the checks start jobs themselves" in done.stderr


def test_a_benchmark_of_ranks_says_where_their_time_went() -> None:
    done = lfm2kit(
        "bench", "--ranks", "1,2", "-n", "4", "-r", "1", "-b", "reference", "--json", "-"
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert faults(record) == []
    alone, both = record["results"]
    assert (alone["ranks"], both["ranks"]) == (1, 2)
    assert sum(both["parts"].values()) == pytest.approx(both["median_seconds"])
    assert both["parts"]["exchange"] > 0 == alone["parts"]["exchange"]


def test_a_job_of_a_benchmark_that_fails_is_one_line() -> None:
    done = lfm2kit("bench", "--ranks", "2", "-n", "4", "-b", "nosuch")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "lfm2kit: error: unknown backend 'nosuch'" in done.stderr
