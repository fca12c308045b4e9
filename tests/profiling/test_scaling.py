"""The scaling curve: from a record of `lfm2kit bench --ranks` to a picture, a table and JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lfm2kit.cli.scaling import KIND
from lfm2kit.errors import Lfm2kitError
from lfm2kit.profiling.page.axis import Axis
from lfm2kit.profiling.page.scaling import scaling
from lfm2kit.profiling.scaling import Curve, Point, curves_in
from tests.checkpoint.typed import Cli
from tests.records.validating import faults

JOBS = ((4, 8, 30.0), (1, 8, 10.0), (2, 8, 15.0), (1, 16, 12.0))  # ranks, samples, samples/s


def record(path: Path, jobs: Any = JOBS, kind: str = KIND) -> Path:
    rows = [
        {"backend": "reference", "test": f"model {n}x16", "ranks": ranks, "samples_per_second": s}
        for ranks, n, s in jobs
    ]
    path.write_text(json.dumps({"kind": kind, "version": 1, "results": rows}))
    return path


def test_what_does_the_same_is_one_curve(tmp_path: Path) -> None:
    first, second = curves_in(record(tmp_path / "bench.json"), KIND)
    assert first == Curve("reference: model 8x16", [Point(1, 10.0), Point(2, 15.0), Point(4, 30.0)])
    assert [first.ideal(point) for point in first.points] == [10.0, 20.0, 40.0]
    assert [first.efficiency(point) for point in first.points] == [1.0, 0.75, 0.75]
    assert second.points == [Point(1, 12.0)]


def test_the_picture_has_a_dot_for_each_job_and_an_ideal_line_for_each_curve(
    tmp_path: Path,
) -> None:
    picture = scaling(curves_in(record(tmp_path / "bench.json"), KIND))
    assert picture.svg.count("<circle") == len(picture.rows) == 4
    assert picture.svg.count('class="ideal"') == 2
    assert picture.rows[1] == ("reference: model 8x16", "2", "15", "20", "75")


@pytest.mark.parametrize(("base", "top"), [(10, 1000.0), (2, 8.0)])
def test_an_axis_ends_at_the_powers_around_its_values(base: int, top: float) -> None:
    axis = Axis([1.0, top], 0, 300, base)
    assert axis.powers() == [float(base) ** i for i in range(4)]
    assert [axis.at(power) for power in axis.powers()] == pytest.approx([0, 100, 200, 300])


@pytest.mark.parametrize(
    ("jobs", "kind", "says"),
    [
        (JOBS, "lfm2kit bench", "'kind' is 'lfm2kit bench', not 'lfm2kit bench --ranks'"),
        (JOBS[:1], KIND, "it compares no numbers of ranks"),
        ([("2", 8, 1.0)], KIND, "results[0].ranks is '2'; expected a whole"),
        ([(2, 8, -1.0)], KIND, "results[0].samples_per_second is -1.0"),
    ],
)
def test_a_file_of_something_else_is_one_line(
    jobs: Any, kind: str, says: str, tmp_path: Path
) -> None:
    path = record(tmp_path / "bench.json", jobs, kind)
    with pytest.raises(Lfm2kitError) as raised:
        curves_in(path, KIND)
    assert says in str(raised.value)


def test_the_command_shows_and_writes_the_curve(
    cli: Cli, random_folder: Path, tmp_path: Path
) -> None:
    file, html = record(tmp_path / "bench.json"), tmp_path / "page.html"
    asked = ("profile", "-b", "reference", "-n", "1", "--seq-len", "2", "-r", "1")
    written = tmp_path / "record.json"
    done = cli(*asked, "-m", random_folder, "--scaling", file, "--html", html, "--json", written)
    assert done.code == 0, done.err
    assert "% of the ideal" in done.out
    assert "<h2>Scaling</h2>" in html.read_text(encoding="utf-8")
    fields = json.loads(written.read_text(encoding="utf-8"))
    assert faults(fields) == []
    assert [(job["ranks"], job["efficiency"]) for job in fields["scaling"]] == [
        (1, 1.0), (2, 0.75), (4, 0.75), (1, 1.0),
    ]  # fmt: skip


def test_the_record_is_not_replaced(cli: Cli, random_folder: Path, tmp_path: Path) -> None:
    file = record(tmp_path / "bench.json")
    same = ("--scaling", file, "--json", file)
    cli("profile", "-b", "reference", "-m", random_folder, *same).assert_fails("bench.json")
    assert "results" in file.read_text()
