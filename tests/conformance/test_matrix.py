"""The support matrix: what is built, judged, failed and not built, by kind, width and precision."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lfm2kit import specs
from lfm2kit.backend import Context, Spec
from lfm2kit.cli import matrix as command
from lfm2kit.reference import feed_forward
from lfm2kit.testing import CHECKS, matrix
from lfm2kit.testing.matrix import Cell, support_matrix
from tests.checkpoint.typed import Cli
from tests.conformance import broken
from tests.conformance.broken import BrokenBackend
from tests.conformance.test_kit import plugins_with


class OnlySome(BrokenBackend):
    """Builds MLPs and norms, of odd widths in part, and of those up to 512."""

    def why_unsupported(self, spec: Spec) -> str | None:
        if not isinstance(spec, specs.MLP | specs.RMSNorm | specs.LastRows):
            return "it has no kernel"
        width = spec.hidden_size
        return None if width in (24, 128, 256, 512) else "its kernels have other tiles"


def found(backend: OnlySome, *ids: str) -> dict[tuple[str, str], Cell]:
    cells = support_matrix("mine", plugins_with(backend), [Context()], ids)
    assert {cell.precision for cell in cells} == {"fp32"}
    return {(cell.kind, cell.width): cell for cell in cells}


def test_what_is_built_is_judged_by_the_checks_that_look_at_it() -> None:
    cells = found(OnlySome({}), "mlp", "real-widths")
    missing = "1 of 2 are not built: its kernels have other tiles"
    assert cells["mlp", "1-63"][3:] == ("judged", missing)
    assert cells["mlp", "64-255"][3:] == ("judged", "")
    assert cells["mlp", "256"].state == "judged", "in place of 2048, which it does not build"
    assert cells["mlp", "512"][3:] == ("built", "")
    assert cells["mlp", "2048"][3:] == ("not built", "its kernels have other tiles")
    assert cells["norm", "64-255"].state == "built", "no check has looked at it"
    assert cells["conv", "1-63"][3:] == ("not built", "it has no kernel")
    assert {width for kind, width in cells if kind == "choice"} == {"1-63"}


def test_a_failure_is_that_of_the_block_it_names() -> None:
    cells = found(OnlySome({specs.MLP: broken.w1_w3_swapped(feed_forward.MLP)}), "mlp", "norm")
    assert cells["mlp", "1-63"][3:] == ("failed", "mlp")
    assert cells["norm", "1-63"].state == "judged"


@pytest.fixture
def few_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the suite have two checks."""
    few = {name: CHECKS[name] for name in ("mlp", "lm-head")}
    monkeypatch.setattr(matrix, "CHECKS", few)
    monkeypatch.setattr(command, "CHECKS", few)


@pytest.mark.usefixtures("few_checks")
def test_the_command_shows_and_writes_it(cli: Cli, tmp_path: Path) -> None:
    done = cli("backends", "matrix", "reference", "--json", tmp_path / "matrix.json")
    assert done.code == 0
    assert "blocks of 'reference' in fp32, by hidden_size" in done.out
    document = json.loads((tmp_path / "matrix.json").read_text())
    assert {"machine", "suite_version", "backend"} < set(document)
    assert {"precision", "kind", "width", "state", "detail"} == set(document["blocks"][0])
    states = {(row["kind"], row["width"]): row["state"] for row in document["blocks"]}
    assert (states["mlp", "1-63"], states["norm", "1-63"]) == ("judged", "built")


@pytest.mark.usefixtures("few_checks")
def test_the_command_prints_markdown_to_be_published(cli: Cli) -> None:
    done = cli("backends", "matrix", "reference", "--markdown")
    assert done.out.startswith("# What `reference` builds\n\nBy lfm2kit ")
    assert "\n| mlp | judged | judged | built | built | built | built |\n" in done.out
    cli("backends", "matrix", "reference", "--markdown", "--json", "-").assert_fails("--markdown")
    cli("backends", "matrix", "refrence").assert_fails("refrence", "reference")
    cli("backends", "matrix", "reference", "--precision", "fp7").assert_fails("fp7", "fp32")


@pytest.mark.usefixtures("few_checks")
def test_a_failure_in_the_matrix_is_a_wrong_result(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: object, x: object) -> None:
        raise RuntimeError("no registers")

    monkeypatch.setattr(feed_forward.MLP, "__call__", fails)
    done = cli("backends", "matrix", "reference", "--markdown")
    assert done.code == 1
    assert "- mlp 1-63: failed: mlp\n" in done.out
