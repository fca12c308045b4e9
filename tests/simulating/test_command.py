"""`lfm2kit plan --simulate`: its table, its document, and what it refuses."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lfm2kit.building import kept_rates
from lfm2kit.building.load import Load, unused
from lfm2kit.building.rank_rates import ExchangeKey, ExchangeRates
from lfm2kit.cli.console import write_document
from lfm2kit.records.machine import described
from tests.checkpoint.typed import Cli, Typed
from tests.random_model import RANDOM
from tests.simulating.rates import FAST, calibration

ASKED = "ranks=1..4,per-node=2,link=25Gbit,n=16/64"
Plan = Callable[..., Typed]
NEAR = (ExchangeRates(ExchangeKey(2, 1), FAST),)


@pytest.fixture
def plan(cli: Cli, random_folder: Path) -> Plan:
    """Return `lfm2kit plan` for the model of the rates."""
    return lambda *words: cli("plan", "-m", random_folder, *words)


@pytest.fixture
def rates(tmp_path: Path) -> Path:
    path = tmp_path / "rates.json"
    write_document(path, calibration(exchanges=NEAR).document())
    return path


def test_the_document_has_every_job_and_says_that_it_is_a_prediction(
    plan: Plan, rates: Path, tmp_path: Path
) -> None:
    document = tmp_path / "jobs.json"
    done = plan("--rates", rates, "--simulate", ASKED, "--json", document)
    assert done.code == 0, done.err
    fields = json.loads(document.read_text())
    assert fields["kind"] == "lfm2kit plan --simulate"
    assert {one["name"].rpartition(": ")[2] for one in fields["figures"]} == {"predicted time"}
    assert (fields["backend"], fields["precision"]) == ("loom", "fp32")
    assert fields["rates_of"] == {"processor": "a loom"}
    jobs = [(job["ranks"], job["n"], job["layout"]) for job in fields["jobs"]]
    two, four = ("dp", "ep"), ("dp", "ep", "ep in a machine, dp between")
    layouts = {1: ("one rank",), 2: two, 4: four}
    assert jobs == [(r, n, name) for r in (1, 2, 4) for n in (16, 64) for name in layouts[r]]
    for job in fields["jobs"]:
        assert job["seconds"] == pytest.approx(sum(job["parts"].values()))
        assert job["samples_per_second"] == pytest.approx(job["n"] / job["seconds"])
        assert len(job["sent_bytes"]) == len(job["sent_messages"]) == job["ranks"]
    assert sum(job["best"] for job in fields["jobs"]) == 6
    assert "PREDICTED, by the rates in" in done.out
    assert f"which were not measured here: {fields['notes'][0].partition(': ')[2]}" in done.out
    assert done.out.count("4 ranks, n=64: ") == 1


def test_the_document_alone_goes_to_stdout(plan: Plan, rates: Path) -> None:
    done = plan("--rates", rates, "--simulate", "ranks=1,n=1", "--json", "-")
    assert [job["layout"] for job in json.loads(done.out)["jobs"]] == ["one rank"]


def test_without_a_file_the_rates_that_are_kept_are_used(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(kept_rates, "root_folder", lambda: tmp_path / "cache")
    simulate = ("--simulate", "ranks=1,n=1")
    plan(*simulate).assert_fails(
        "--simulate: no rates are kept for this machine", "--rates rates.json"
    )
    four = ("--simulate", "ranks=1..8,per-node=4,n=1")
    plan(*four).assert_fails("with --ranks 4; or give the file of a calibration")
    measured = calibration(machine=described(kept_rates.Context("fp32", None, 1)))
    path, kept = kept_rates.with_kept(measured)
    write_document(path, kept.document())
    done = plan(*simulate)
    assert done.code == 0, done.err
    assert f"by the rates in {path}" in done.out


def test_rates_of_experts_in_another_format_are_used_only_where_there_are_no_others(
    plan: Plan, rates: Path
) -> None:
    document = json.loads(rates.read_text())
    (side,) = document["sides"]
    other = {**side, "stored": "F32", "expert_bytes": 10 * side["expert_bytes"]}

    def simulated(*sides: object) -> Any:
        rates.write_text(json.dumps({**document, "sides": sides}))
        done = plan("--rates", rates, "--simulate", "ranks=1,n=1", "--json", "-")
        assert done.code == 0, done.err
        return {k: v for k, v in json.loads(done.out).items() if k != "date"}

    both, same, others = simulated(other, side), simulated(side), simulated(other)
    assert both == same
    assert len(same["notes"]) == 1
    assert others["jobs"][0]["weight_bytes"] > same["jobs"][0]["weight_bytes"]
    said = "they are of experts stored in F32, and the model's are in BF16"
    assert others["notes"][1:] == [said]
    done = plan("--rates", rates, "--simulate", "ranks=1,n=1")
    assert said in " ".join(done.out.split())


def test_rates_of_blocks_in_another_format_are_used_only_where_there_are_no_others(
    plan: Plan, rates: Path
) -> None:
    document = json.loads(rates.read_text())
    (mlp,) = (one for one in document["blocks"] if one["block"].startswith("MLP("))
    others = [one for one in document["blocks"] if one != mlp]
    float32 = {**mlp, "stored": "F32", "kept_bytes": 10 * mlp["kept_bytes"]}

    def simulated(*mlps: object) -> Any:
        rates.write_text(json.dumps({**document, "blocks": [*mlps, *others]}))
        done = plan("--rates", rates, "--simulate", "ranks=1,n=1", "--json", "-")
        assert done.code == 0, done.err
        return {k: v for k, v in json.loads(done.out).items() if k != "date"}

    both, same, only_other = simulated(float32, mlp), simulated(mlp), simulated(float32)
    assert both == same
    assert only_other["jobs"][0]["weight_bytes"] > same["jobs"][0]["weight_bytes"]
    said = "they are of other blocks stored in F32, and the model's are in BF16"
    assert only_other["notes"][1:] == [said]


def test_a_simulation_shows_its_progress(
    plan: Plan, rates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[int] = []

    @contextmanager
    def shown(title: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        yield done.append
        assert sum(done) == total > 0

    monkeypatch.setattr(sys.modules["lfm2kit.cli.simulating"], "progress", shown)
    assert plan("--rates", rates, "--simulate", "ranks=1,n=16").code == 0
    assert done == [1] * 8


def test_messages_of_a_job_with_overlap_are_said_to_be_those_without(
    plan: Plan, rates: Path
) -> None:
    jobs = []
    for overlap in ("0", "1"):
        asked = f"{ASKED},overlap={overlap}"
        done = plan("--rates", rates, "--simulate", asked, "--json", "-")
        jobs.append(json.loads(done.out))
    plain, overlapped = ([job["sent_messages"] for job in one["jobs"]] for one in jobs)
    assert plain == overlapped
    assert ["without overlap" in " ".join(one["notes"]) for one in jobs] == [False, True]


def test_a_load_is_what_tokens_choose(plan: Plan, rates: Path, tmp_path: Path) -> None:
    layers = tuple(one._replace(counts=(400, *[80] * 15)) for one in unused(RANDOM.spec))
    load = tmp_path / "load.json"
    write_document(load, Load("tiny", 128, 400, layers).document())

    def sent(*more: object) -> Any:
        done = plan("--rates", rates, "--simulate", ASKED, "--json", "-", *more)
        assert done.code == 0, done.err
        jobs = json.loads(done.out)["jobs"]
        return sum(sum(job["sent_bytes"]) for job in jobs if job["layout"] == "ep")

    assert sent("--load", load, "--replicate-experts", 1) < sent("--load", load)
    many = ("--load", load, "--replicate-experts", 17)
    plan("--rates", rates, "--simulate", ASKED, *many).assert_fails("has 16 experts")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--simulate", "ranks=1"], ["--simulate ranks=1: n is missing"]),
        (["--simulate", "ranks=x,n=1"], ["--simulate ranks=x: expected numbers such as"]),
        (["--simulate", "ranks=1,n=1", "--ranks", 4], ["--simulate has ranks of its own"]),
        (["--simulate", "ranks=1,n=1", "--trim"], ["--trim: not together with --simulate"]),
        (["--simulate", "ranks=1,n=1", "--rank", 3], ["--rank 3: not together with --simulate"]),
        (["--simulate", "ranks=1,n=1", "--tokens", 5], ["--tokens 5: not together", "tokens= is"]),
        (["--simulate", "ranks=1,n=1", "--context", 9], ["--context 9: not together"]),
        (["--simulate", "ranks=1,n=1", "--sequences", 4], ["--sequences 4: not together"]),
        (["--simulate", "ranks=1,n=1", "--exchange", "host"], ["--exchange host: not together"]),
        (["--simulate", "ranks=1,n=1", "--ep-size", 2], ["--ep-size 2: there is only one rank"]),
        (["--simulate", "ranks=4/5,n=1", "--ep-size", 3], ["5 ranks cannot form groups of 3"]),
        (["--simulate", "ranks=1,n=1", "-b", "a,1.moe=b"], ["takes one backend"]),
        (["--simulate", "ranks=1,n=1", "-b", "cuda"], ["no rates of", "loom in fp32"]),
        (["--simulate", "ranks=1,n=1", "--precision", "bf16"], ["of no blocks in bf16"]),
        (["--simulate", "ranks=2,n=1"], ["no exchange between machines; give its link"]),
    ],
)
def test_what_is_wrong_is_one_line(
    plan: Plan, rates: Path, arguments: list[object], words: list[str]
) -> None:
    plan("--rates", rates, *arguments).assert_fails(*words)


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "there is no rate of copies": lambda d: d.update(copies=None),
    "version is 2": lambda d: d.update(version=2),
    "no rates of experts of 128 x 48": lambda d: d.update(sides=[]),
}


@pytest.mark.parametrize("said", CHANGES)
def test_a_file_that_lacks_rates_is_named(plan: Plan, rates: Path, said: str) -> None:
    document = json.loads(rates.read_text())
    CHANGES[said](document)
    rates.write_text(json.dumps(document))
    plan("--rates", rates, "--simulate", "ranks=1,n=1").assert_fails(str(rates), said)


def test_rates_alone_still_need_a_limit(cli: Cli, rates: Path) -> None:
    cli("plan", "--rates", rates).assert_fails("--rates", "needs a limit", "--gpu-memory 24GiB")
    cli("run", "--rates", rates).assert_fails("--rates", "needs a limit", "--gpu-memory 24GiB")
