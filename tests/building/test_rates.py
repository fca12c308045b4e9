"""A file of rates says what was measured, and anything else is one line that names the field."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfm2kit.backend import Ceilings
from lfm2kit.building.curves import Curve
from lfm2kit.building.rank_rates import BlockKey, BlockRates, ExchangeKey, ExchangeRates
from lfm2kit.building.rates import (
    VERSION,
    Calibration,
    Call,
    Experts,
    Link,
    Rates,
    Side,
    read_calibration,
)
from lfm2kit.errors import Lfm2kitError
from lfm2kit.formats import BF16

HOST = Experts("cpu", "fp32", 2048, 1792, "BF16")
DEVICE = Experts("gpu", "bf16", 2048, 1792, "BF16")
CURVE = Curve((1, 16, 64), (1e-3, 2e-3, 6e-3))
CALIBRATION = Calibration(
    "2026-11-29T00:00:00+00:00",
    {"processor": "an abacus", "cores": "2"},
    "tiny",
    (
        Side(HOST, "host", 22_020_096, CURVE, None, Ceilings(1e12, 1e11), {}),
        Side(
            DEVICE,
            "gpu:0",
            22_020_096,
            CURVE,
            Link(46e9, 55e9),
            None,
            {"device": "a loom"},
            BF16,
            Call(12, 2e-5),
        ),
    ),
    (
        BlockRates(
            BlockKey("MLP(hidden_size=8, intermediate_size=4)", "cpu", "fp32", "BF16"), 384, CURVE
        ),
    ),
    (
        ExchangeRates(ExchangeKey(4, 1), Curve((4, 2**40), (1e-5, 100.0))),
        ExchangeRates(ExchangeKey(4, 2), CURVE),
    ),
    5e9,
)


def test_between_measurements_a_curve_is_linear_and_after_the_last_in_proportion() -> None:
    assert CURVE.at([1, 8.5, 16, 64, 128]) == pytest.approx([1e-3, 1.5e-3, 2e-3, 6e-3, 12e-3])


def test_more_rows_never_take_less_time() -> None:
    noisy = Curve((1, 4, 16, 64), (1e-3, 3e-3, 2e-3, 2.5e-3))
    seconds = noisy.at(np.arange(1, 200))
    assert np.all(np.diff(seconds) >= 0)
    assert noisy.at(16) == pytest.approx(3e-3)


def written(path: Path, change: Callable[[dict[str, Any]], object] = lambda d: None) -> Path:
    document = json.loads(json.dumps(CALIBRATION.document()))
    change(document)
    path.write_text(json.dumps(document))
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = written(tmp_path / "rates.json")
    read = read_calibration(path)
    assert read == CALIBRATION
    there = Rates(22_020_096, CURVE, CURVE, 46e9, 55e9, 22_020_096, 1e11)
    assert read.rates(path, HOST, DEVICE) == there


def test_what_was_measured_last_replaces_what_is_the_same() -> None:
    slower = Curve((1,), (1.0,))
    exchange = ExchangeRates(ExchangeKey(2, 2), slower)
    block = replace(CALIBRATION.blocks[0], call=slower)
    newer = Calibration("later", {}, "another", CALIBRATION.sides[:1], (block,), (exchange,))
    both = CALIBRATION.replaced_by(newer)
    assert (both.date, both.model, both.copies) == ("later", "another", 5e9)
    assert both.blocks == (block,)
    assert both.exchanges == (*CALIBRATION.exchanges, exchange)
    assert both.sides == CALIBRATION.sides


def test_blocks_of_weights_in_another_format_are_kept_beside_each_other() -> None:
    (block,) = CALIBRATION.blocks
    other = replace(block, key=block.key._replace(stored="F32"), call=Curve((1,), (1.0,)))
    newer = replace(CALIBRATION, blocks=(other,))
    assert CALIBRATION.replaced_by(newer).blocks == (block, other)


def test_rates_that_are_not_there_are_named_with_those_that_are() -> None:
    path = Path("rates.json")
    with pytest.raises(Lfm2kitError, match=r"no rates of 2048 x 1792 .* by gpu in fp32; avail"):
        CALIBRATION.rates(path, HOST, DEVICE._replace(precision="fp32"))
    with pytest.raises(Lfm2kitError, match=r"by cpu in fp32; 2048 x 1792 .* by gpu in bf16; meas"):
        CALIBRATION.rates(path, HOST._replace(stored="F32"), DEVICE)
    with pytest.raises(Lfm2kitError, match="host's memory, which needs no link"):
        CALIBRATION.rates(path, DEVICE, HOST)


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another kind": (
        lambda d: d.update(kind="lfm2kit load"),
        "'lfm2kit load', not 'lfm2kit rates'",
    ),
    "an earlier version": (lambda d: d.update(version=VERSION - 1), "version is 5"),
    "a later version": (lambda d: d.update(version=VERSION + 1), "version is 7"),
    "a machine that is a text": (lambda d: d.update(machine="x"), "machine is 'x'"),
    "cores that are a number": (lambda d: d["machine"].update(cores=2), "an object of texts"),
    "no date": (lambda d: d.pop("date"), "date is missing"),
    "a field too many": (lambda d: d.update(rates=[]), "rates is unknown"),
    "no sides": (lambda d: d.update(sides=None), "sides is None"),
    "a side twice": (
        lambda d: d["sides"].append(d["sides"][0]),
        "has rates of .* again; keep the right ones",
    ),
    "a size of 0": (lambda d: d["sides"][0].update(hidden_size=0), r"sides\[0\].hidden_size is 0"),
    "no bytes": (lambda d: d["sides"][0].update(expert_bytes=0), "expert_bytes is 0"),
    "rows that fall": (lambda d: d["sides"][0].update(rows=[1, 64, 16]), "ascending numbers"),
    "no rows": (lambda d: d["sides"][0].update(rows=[], seconds=[]), "ascending numbers"),
    "a row of seconds": (
        lambda d: d["sides"][0].update(seconds=[1.0]),
        "3 numbers, as many",
    ),
    "seconds below 0": (
        lambda d: d["sides"][1].update(seconds=[1, 2, -3]),
        r"sides\[1\].seconds\[2\] is -3",
    ),
    "a link that is a number": (lambda d: d["sides"][1].update(link=46e9), "an object"),
    "rows of 4 bits": (
        lambda d: d["sides"][0].update(row_format="Q4_0"),
        "row_format is 'Q4_0'; expected F32 or F16 or BF16",
    ),
    "half a link": (lambda d: d["sides"][1]["link"].pop("to_host"), "link.to_host is missing"),
    "a link too fast": (lambda d: d["sides"][1]["link"].update(to_host=1e30), "to_host is 1e"),
    "a third way": (lambda d: d["sides"][1]["link"].update(up=1.0), "link.up is unknown"),
    "ceilings of 0": (lambda d: d["sides"][0]["ceilings"].update(flops=0), "ceilings.flops is 0"),
    "a block twice": (
        lambda d: d["blocks"].append(d["blocks"][0]),
        r"blocks\[1\] has rates of .*MLP.* again",
    ),
    "a block without rows": (lambda d: d["blocks"][0].pop("rows"), r"blocks\[0\].rows is missing"),
    "a block of negative size": (
        lambda d: d["blocks"][0].update(kept_bytes=-1),
        "kept_bytes is -1",
    ),
    "an unknown field of a block": (lambda d: d["blocks"][0].update(x=1), r"blocks\[0\].x is unkn"),
    "an exchange twice": (
        lambda d: d["exchanges"].append(d["exchanges"][1]),
        r"exchanges\[2\] has rates of .* again",
    ),
    "an exchange of one rank": (lambda d: d["exchanges"][0].update(ranks=1), "ranks is 1"),
    "more machines than ranks": (
        lambda d: d["exchanges"][0].update(machines=5),
        "machines is 5; expected a whole number from 1 to 4",
    ),
    "messages that fall": (lambda d: d["exchanges"][0].update(bytes=[4, 1]), "ascending numbers"),
    "copies of 0": (lambda d: d.update(copies=0), "copies is 0"),
    "an unknown rate": (lambda d: d["sides"][0].update(power=1), r"sides\[0\].power is unknown"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_wrong_field_is_named_with_its_file(tmp_path: Path, name: str) -> None:
    change, said = CHANGES[name]
    path = written(tmp_path / "rates.json", change)
    with pytest.raises(Lfm2kitError, match=said) as raised:
        read_calibration(path)
    assert str(raised.value).startswith(str(path))
