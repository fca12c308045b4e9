"""`lfm2kit calibrate`: its table, its file, and what it refuses before it measures."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lfm2kit import kernel_cache
from lfm2kit.backend import Context
from lfm2kit.building import kept_rates
from lfm2kit.building.rates import Calibration, read_calibration
from lfm2kit.checkpoint.spec_files import spec_text
from lfm2kit.cli.report import Output
from lfm2kit.measuring import block_times, calibration, exchange_times, together
from lfm2kit.process.streams import READER_GONE, ReaderGone
from tests.checkpoint.typed import Cli
from tests.core.small import small_spec
from tests.records.validating import faults


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kept_rates, "root_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(together, "REPETITIONS", 1)
    monkeypatch.setattr(calibration, "ROWS", (1, 4))
    monkeypatch.setattr(block_times, "ROWS", (1, 4))
    monkeypatch.setattr(exchange_times, "COPY_BYTES", 1)


def test_the_file_and_the_document_say_what_the_table_shows(cli: Cli, tmp_path: Path) -> None:
    rates, document = tmp_path / "rates.json", tmp_path / "document.json"
    done = cli("calibrate", "-b", "reference", "--output", rates, "--json", document)
    assert done.code == 0, done.err
    measured = read_calibration(rates)
    assert json.loads(document.read_text()) == json.loads(rates.read_text())
    assert faults(json.loads(rates.read_text())) == []
    assert [side.experts.backend for side in measured.sides] == ["cpu_simd", "reference"]
    for side in measured.sides:
        assert side.product.sizes == calibration.ROWS
        assert str(side.experts) in done.out
    assert "by rows" in done.out


def test_without_a_file_the_rates_are_kept_for_this_machine(cli: Cli, tmp_path: Path) -> None:
    """What is measured later is added, and replaces what is the same."""
    calibrate = ("calibrate", "-b", "reference", "--threads", 1)
    done = cli(*calibrate)
    assert done.code == 0, done.err
    (path,) = (tmp_path / "cache" / "rates").iterdir()
    assert f"kept in {path}, for --gpu-memory" in " ".join(done.out.split())
    first = read_calibration(path)
    assert [side.experts.backend for side in first.sides] == ["cpu_simd", "reference"]
    cli(*calibrate, "--precision", "bf16", "-b", "cpu_simd")
    assert cli(*calibrate).code == 0
    last = read_calibration(path)
    assert {side.experts[:2] for side in last.sides} == {
        ("cpu_simd", "fp32"),
        ("cpu_simd", "bf16"),
        ("reference", "fp32"),
    }
    assert last.sides[0].product != first.sides[0].product
    cli("calibrate", "-b", "reference", "--threads", 2)
    assert len(list(path.parent.iterdir())) == 2, "threads are a part of the machine"


@pytest.mark.parametrize(("named", "mode"), [("", 0o700), ("a folder", 0o755)])
def test_others_read_kept_rates_only_where_a_folder_was_named_for_all(
    named: str, mode: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever the environment of the tests names, and whoever runs them."""
    monkeypatch.setenv(kernel_cache.VARIABLE, named)
    monkeypatch.setattr(kernel_cache, "_trusted_by_all", lambda: {os.geteuid()})
    path, _ = kept_rates.with_kept(Calibration("today", {}, "tiny", ()))
    assert path.parent == tmp_path / "cache" / "rates"
    assert path.parent.stat().st_mode & 0o777 == mode


def test_rates_that_cannot_be_kept_are_shown_all_the_same(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("not a folder")
    for root in (None, tmp_path / "cache"):
        monkeypatch.setattr(kept_rates, "root_folder", lambda root=root: root)
        done = cli("calibrate", "-b", "reference", "--json", "-")
        assert done.code == 0
        assert json.loads(done.out)["kind"] == "lfm2kit rates"
        assert "the rates are not kept: " in done.err


def test_rates_are_kept_even_if_nobody_reads_the_table(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def gone(*arguments: object) -> None:
        raise ReaderGone

    monkeypatch.setattr(Output, "line", gone)
    rates, document = tmp_path / "rates.json", tmp_path / "document.json"
    calibrate = ("calibrate", "-b", "reference")
    assert cli(*calibrate, "--output", rates, "--json", document).code == READER_GONE
    assert read_calibration(rates) == read_calibration(document)
    assert cli(*calibrate).code == READER_GONE
    assert len(list((tmp_path / "cache" / "rates").iterdir())) == 1


def test_one_calibration_at_a_time_measures_and_keeps_its_rates(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "cache" / "rates"
    folder.mkdir(parents=True, mode=0o700)
    seen: list[str] = []

    def wait(seconds: float) -> None:
        seen.append("waits")
        os.close(other)

    def look(name: str) -> Callable[..., Any]:
        real = getattr(command, name)

        def looking(*arguments: Any) -> Any:
            seen.append(name if is_locked(folder) else f"{name} beside another one")
            return real(*arguments)

        return looking

    clock = SimpleNamespace(monotonic=time.monotonic, sleep=wait)
    monkeypatch.setattr(kept_rates, "time", clock)
    command = import_module("lfm2kit.cli.calibrate")
    for name in ("calibrated", "with_kept", "write_document"):
        monkeypatch.setattr(command, name, look(name))
    other = os.open(folder, os.O_RDONLY)
    assert kernel_cache.locked(other)
    done = cli("calibrate", "-b", "reference")
    assert done.code == 0, done.err
    assert "another lfm2kit calibrate is measuring; waiting until it has ended" in done.err
    assert seen == ["waits", "calibrated", "with_kept", "write_document"]
    assert not is_locked(folder)


def test_a_calibration_that_does_not_end_is_waited_for_no_longer(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "cache" / "rates"
    folder.mkdir(parents=True, mode=0o700)
    monkeypatch.setattr(kept_rates, "LONGEST_TURN", 0.2)
    other = os.open(folder, os.O_RDONLY)
    assert kernel_cache.locked(other)
    done = cli("calibrate", "-b", "reference")
    assert (done.code, done.out) == (2, "")
    assert "has not ended after 0.2 s; end it, and measure again" in done.err
    os.close(other)


def is_locked(folder: Path) -> bool:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        return not kernel_cache.locked(descriptor)
    finally:
        os.close(descriptor)


def test_kept_rates_are_read_whatever_the_umask(cli: Cli, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        assert cli("calibrate", "-b", "reference").code == 0
    finally:
        os.umask(before)
    (path,) = (tmp_path / "cache" / "rates").iterdir()
    assert kept_rates.read_kept(Context()) == (path, read_calibration(path))


def test_rates_are_not_kept_where_a_link_leads(cli: Cli, tmp_path: Path) -> None:
    calibrate = ("calibrate", "-b", "reference")
    assert cli(*calibrate).code == 0
    (path,) = (tmp_path / "cache" / "rates").iterdir()
    mine = path.rename(tmp_path / "mine")
    before = mine.read_text()
    path.symlink_to(mine)
    done = cli(*calibrate)
    assert done.code == 0
    assert "the rates are not kept: " in done.err
    assert "neither a file nor a folder" in done.err
    assert mine.read_text() == before


def test_the_document_alone_goes_to_stdout(cli: Cli) -> None:
    done = cli("calibrate", "-b", "reference", "--json", "-")
    assert done.code == 0
    assert json.loads(done.out)["kind"] == "lfm2kit rates"


def test_what_is_wrong_shows_before_anything_is_measured(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "dense.toml").write_text(spec_text(small_spec(num_dense_layers=4)))
    kept = tmp_path / "plan.toml"
    kept.write_text('default = "reference"')
    calibrate = ("calibrate", "-b", "reference")
    cli(*calibrate, "-m", tmp_path / "dense.toml").assert_fails("no experts")
    cli(*calibrate, "--output", tmp_path).assert_fails("--output", "folder")
    cli("calibrate", "--plan", kept, "--output", kept).assert_fails("--output", "the plan")
    same = tmp_path / "same"
    cli(*calibrate, "--output", same, "--json", same).assert_fails("--output", "as well")
    cli(*calibrate, "--precision", "half").assert_fails("'reference'", "precision half")
    assert not same.exists()
