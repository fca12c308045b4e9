"""`lfm2kit compare`: what it says of two records, and what it refuses."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lfm2kit.process.streams import READER_GONE, ReaderGone
from tests.checkpoint.typed import Cli, Typed
from tests.records.validating import faults

MACHINE = {"processor": "a loom", "cores": "2", "lfm2kit": "0.1.0", "numpy": "2.0.0"}
FAST, SLOW = [1.0, 1.1, 0.9, 1.05, 0.95], [2.0, 2.1, 1.9, 2.05, 1.95]


def figure(name: str, *values: float, better: str | None = "lower", unit: str = "s") -> Any:
    return {"name": name, "unit": unit, "better": better, "values": list(values)}


def record(*figures: Any, **more: Any) -> dict[str, Any]:
    head = {"kind": "loom weave", "version": 1, "date": "2026-01-01T00:00:00+00:00"}
    return {**head, "machine": MACHINE, "options": {}, "figures": list(figures), **more}


@pytest.fixture
def compared(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Typed, Any]]:
    """Write two records, compare them, and return what is said and the document."""
    monkeypatch.chdir(tmp_path)

    def run(before: Any, after: Any, *words: object) -> tuple[Typed, Any]:
        for name, one in (("a.json", before), ("b.json", after)):
            text = one if isinstance(one, str) else json.dumps(one)
            (tmp_path / name).write_text(text)
        Path("c.json").unlink(missing_ok=True)
        done = cli("compare", "a.json", "b.json", "--json", "c.json", *words)
        document = json.loads(Path("c.json").read_text()) if Path("c.json").exists() else None
        return done, document

    return run


@pytest.mark.parametrize(
    ("before", "after", "verdict", "change"),
    [
        (figure("a", *FAST), figure("a", *SLOW), "worse", 1.0),
        (figure("a", *SLOW), figure("a", *FAST), "better", -0.5),
        (figure("a", *FAST, better="higher"), figure("a", *SLOW, better="higher"), "better", 1.0),
        (figure("a", *SLOW, better="higher"), figure("a", *FAST, better="higher"), "worse", -0.5),
        (figure("a", *FAST), figure("a", *SLOW[:4], 1.09), "within the noise", 1.0),
        (figure("a", *FAST), figure("a", *reversed(FAST)), "equal", 0.0),
        (figure("a", *FAST[:4]), figure("a", *SLOW), "noise unknown", 2.0 / 1.025 - 1),
        (figure("a", 1.0), figure("a", 9.0), "noise unknown", 8.0),
        (figure("a", 1.0), figure("a", 1.0), "equal", 0.0),
        (figure("a", 5, better=None), figure("a", 6, better=None), "differs", 0.2),
        (figure("a", 5, better=None), figure("a", 5, 5, better=None), "equal", 0.0),
        (figure("a", 0, better=None), figure("a", 5, better=None), "differs", None),
    ],
)
def test_a_figure_is_judged_by_its_noise(
    compared: Any, before: Any, after: Any, verdict: str, change: float | None
) -> None:
    done, document = compared(record(before), record(after))
    assert done.code == 0, done
    (one,) = document["compared"]
    words = {"noise unknown": "of unknown noise", "differs": "different"}
    assert (one["verdict"], one["change"]) == (verdict, pytest.approx(change))
    assert done.out.splitlines()[-1] == f"1 figure in both records: 1 {words.get(verdict, verdict)}"
    assert faults(document) == []


def test_the_table_has_medians_intervals_and_the_number_of_measurements(compared: Any) -> None:
    before = record(figure("time", *FAST), figure("rest", 1.0), figure("B", 2**20, better=None))
    after = record(figure("time", *SLOW), figure("rest", 2.0), figure("B", 2**20 + 1, better=None))
    lines = [" ".join(line.split()) for line in compared(before, after)[0].out.splitlines()]
    assert "time 1000 ms (900 ms to 1100 ms) 2000 ms (1900 ms to 2100 ms) +100.0 % worse" in lines
    assert "rest 1000 ms 2000 ms +100.0 % one measurement: noise unknown" in lines
    assert lines[-1] == "3 figures in both records: 1 worse, 1 of unknown noise, 1 different"


def test_only_what_has_changed_is_listed_by_name(compared: Any) -> None:
    blocks = [{"block": f"layers.{i}", "backend": "cpu", "bytes": 7} for i in range(3)]
    moved = [{**block, "backend": "loom", "bytes": 8} for block in blocks]
    before = record(
        options={"-n": 2, "--trim": True}, plan="auto", blocks=blocks, seconds={"a": 1}, same=[1]
    )
    after = record(
        machine={**MACHINE, "lfm2kit": "0.2.0"}, options={"-n": 3}, plan="loom", blocks=moved,
        seconds={"a": 2}, same=[1],
    )  # fmt: skip
    done, document = compared(before, after)
    assert document["changes"] == [
        {"part": "machine", "name": "lfm2kit", "before": "0.1.0", "after": "0.2.0"},
        {"part": "options", "name": "-n", "before": 2, "after": 3},
        {"part": "options", "name": "--trim", "before": True, "after": None},
        {"part": "fields", "name": "plan", "before": "auto", "after": "loom"},
        *(
            {"part": "fields", "name": f"layers.{i}.backend", "before": "cpu", "after": "loom"}
            for i in range(3)
        ),
    ]
    lines = [" ".join(line.split()) for line in done.out.splitlines()]
    assert "layers.0.backend and 2 others cpu loom" in lines
    assert "--trim true -" in lines
    assert lines[-1] == "no figure is in both records"


def test_the_first_line_says_that_machines_differ(compared: Any) -> None:
    other = {**MACHINE, "processor": "a press", "devices": {"press": {"device": "P1"}}}
    done, document = compared(record(figure("a", 1.0)), record(figure("a", 2.0), machine=other))
    said = "the machines differ (processor, devices.press.device): the figures compare machines"
    assert done.out.splitlines()[0] == f"{said} rather than versions"
    assert document["other_hardware"] == ["processor", "devices.press.device"]
    done, document = compared(record(), record(machine={**MACHINE, "numpy": "2.1.0"}))
    assert "the machines differ" not in done.out
    assert document["other_hardware"] == []


def test_what_one_record_lacks_is_listed(compared: Any) -> None:
    before = record(figure("a", 1.0), figure("b", 1.0), figure("c", 1.0, unit="B"))
    done, document = compared(before, record(figure("a", 1.0), figure("d", 1.0), figure("c", 1.0)))
    assert (document["only_before"], document["only_after"]) == (["b", "c"], ["d", "c"])
    assert "only in a.json: b, c\nonly in b.json: d, c\n" in done.out


@pytest.mark.parametrize(
    ("after", "code"), [(SLOW, 1), (FAST, 0), ([0.5] * 5, 0), ([*SLOW[:4], 1.0], 0)]
)
def test_a_pipeline_fails_if_a_figure_is_worse_by_more_than_the_noise(
    compared: Any, after: list[float], code: int
) -> None:
    records = (record(figure("a", *FAST), figure("b", 1.0)), record(figure("a", *after)))
    done, document = compared(*records, "--fail-on-slower")
    assert (done.code, done.err) == (code, "")
    assert document is not None
    assert compared(*records)[0].code == 0


def test_a_pipeline_that_could_not_fail_is_refused(compared: Any) -> None:
    records = (record(figure("a", 1.0)), record(figure("a", 2.0, 2.1)))
    done, document = compared(*records, "--fail-on-slower")
    done.assert_fails(
        "--fail-on-slower: no figure has enough values", "5 are needed, and there are 1"
    )
    assert document is None


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        (
            record(),
            record(kind="loom knit"),
            "kind of a.json is loom weave, and that of b.json",
        ),
        (record(), record(version=2), "the version of a.json is 1, and that of b.json is 2"),
        (record(kind="lfm2kit run", version=2), record(), "a.json: the version is 2, and this"),
        (record(kind="lfm2kit ran"), record(), "a.json: unknown kind 'lfm2kit ran'; available: lf"),
        (record(version=True), record(), "a.json: version is True; expected a whole number"),
        ({"kind": "lfm2kit rates", "version": 6}, record(), "a.json: there is no 'figures', so it"),
        ({"figures": []}, record(), "a.json: there is no 'kind', so it is not a record; com"),
        ("[]", record(), "a.json: expected a JSON object"),
        ("{", record(), "a.json: not readable JSON"),
        (record(figures={}), record(), "a.json: figures is {}; expected a list"),
        (record(machine=5), record(), "a.json: machine is 5; expected an object"),
        (record(figure("a")), record(), "a.json: figures[0].values is []; expected one number or"),
        (record(figure("a", "x")), record(), "a.json: figures[0].values[0] is 'x'; expected a nu"),
        (
            record(figure("a", 1, better="no")),
            record(),
            "figures[0].better is 'no'; expected one",
        ),
        (record(figure("a", 1), figure("a", 2)), record(), "a.json: there are two figures 'a'"),
        (record({**figure("a", 1), "x": 1}), record(), "a.json: figures[0].x is unknown"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    compared: Any, before: Any, after: Any, says: str
) -> None:
    done, document = compared(before, after)
    done.assert_fails(says)
    assert document is None


def test_one_record_may_come_from_stdin(compared: Any, cli: Cli, monkeypatch: Any) -> None:
    compared(record(figure("a", *FAST)), record(figure("a", *SLOW)))
    stdin = SimpleNamespace(buffer=io.BytesIO(Path("a.json").read_bytes()), isatty=lambda: False)
    monkeypatch.setattr(sys, "stdin", stdin)
    done = cli("compare", "-", "b.json", "--json", "-")
    assert json.loads(done.out)["records"][0]["name"] == "stdin"
    assert done.err == "1 figure in both records: 1 worse\n"
    cli("compare", "-", "-").assert_fails("stdin has one record")
    cli("compare", "", "b.json").assert_fails("the path is empty")
    cli("compare", "nosuch.json", "b.json").assert_fails("nosuch.json")
    cli("compare", "a.json", "b.json", "--json", "b.json").assert_fails("--json", "one of the rec")


def test_a_reader_that_leaves_is_not_a_verdict(
    compared: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*arguments: Any, **options: Any) -> None:
        raise ReaderGone

    monkeypatch.setattr(sys.modules["lfm2kit.cli.compare"], "show_table", gone)
    records = (record(figure("a", *FAST)), record(figure("a", *SLOW)))
    assert compared(*records, "--fail-on-slower")[0].code == READER_GONE
