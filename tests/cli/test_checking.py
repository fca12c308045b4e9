"""`lfm2kit backends check`: what it runs, what it says of a failure, and how to repeat it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from lfm2kit import specs
from lfm2kit.building.loading import EMBEDDED
from lfm2kit.checkpoint import open_checkpoint
from lfm2kit.reference import feed_forward
from lfm2kit.testing.cases import WIDE_MOE
from lfm2kit.testing.selection import selection
from lfm2kit.testing.widths import Widths, resized
from tests.checkpoint.typed import Cli

CHECK = ("backends", "check", "reference")


def fails(self: object, x: object) -> None:
    raise RuntimeError("no registers")


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_forward.MLP, "__call__", fails)


@pytest.mark.usefixtures("broken")
def test_a_failure_says_where_it_was_and_how_to_repeat_it(cli: Cli) -> None:
    done = cli(*CHECK, "--only", "norm,mlp", "--seed", "3")
    assert done.code == 1
    for words in ("RuntimeError: no registers; raised at ", "test_checking.py:", "last call: "):
        assert words in done.out
    again = "lfm2kit backends check reference --only mlp --seed 3"
    assert f"to repeat what failed: {again}\n" in done.out
    assert "with tracebacks: LFM2KIT_TRACEBACK=1\n" in done.out
    assert done.err == ""


@pytest.mark.usefixtures("broken")
def test_a_failure_shows_its_traceback_if_it_is_asked_for(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LFM2KIT_TRACEBACK", "1")
    done = cli(*CHECK, "--only", "mlp", "--json", "-")
    assert "Traceback (most recent call last):" in done.err
    assert "runner.py" in done.err
    assert "with tracebacks" not in done.err
    (result,) = json.loads(done.out)["results"]
    assert "no registers" in result["traceback"]
    assert result["notes"][0].startswith("raised at ")


def test_only_takes_blocks_beside_checks(cli: Cli) -> None:
    done = cli(*CHECK, "--only", "repeatable,zero-rows,whole-model,attn(head_dim=6),norm()")
    assert (done.code, "2 passed, 0 failed, 0 skipped" in done.out) == (0, True), done
    assert "whole-model" not in done.out  # it looks at no block alone


@pytest.mark.usefixtures("broken")
def test_blocks_are_named_when_a_failure_is_to_be_repeated(cli: Cli) -> None:
    only = "repeatable,norm(),mlp(intermediate_size=40)"
    done = cli(*CHECK, "--only", only, "--json", "-")
    (result,) = json.loads(done.out)["results"]
    assert result["notes"][1] == f"last call: number 1 of {specs.MLP(24, 40)}, 33 rows"
    assert f"check reference --only '{only}'\n" in done.err
    assert cli(*CHECK, "--only", "repeatable,norm()").code == 0


@pytest.mark.parametrize(
    ("only", "fitting"),
    [
        ("mlp()", specs.MLP(3, 5)),
        ("MLP(hidden_size=24, intermediate_size=40)", specs.MLP(24, 40)),
        ("moe(router=router(num_experts=5))", specs.SparseMoe(
            specs.Router(24, 5, 3, True, True, 1.5), specs.Experts(24, 12, 5, 3, (0, 1, 2, 3, 4)))),
        ("experts(local_experts=(0,1,2,3,4), hidden_size=24)",
         specs.Experts(24, 12, 5, 3, (0, 1, 2, 3, 4))),
        ("norm(eps=1e-05)", specs.RMSNorm(24, 1e-5)),
    ],
)  # fmt: skip
def test_a_pattern_fits_what_it_says(only: str, fitting: specs.Spec) -> None:
    (pattern,) = selection(only).patterns
    assert pattern.fits(fitting)
    assert not pattern.fits(specs.ShortConv(24, 3))
    assert selection(str(pattern)).patterns == (pattern,)


@pytest.mark.parametrize(
    ("only", "words"),
    [
        ("mlp(hidden=24)", ("MLP has no field 'hidden'", "Did you mean 'hidden_size'")),
        ("mpl()", ("unknown kind of block 'mpl'", "Did you mean 'mlp'")),
        ("mlp(24)", ("--only 'mlp(24)'", "KIND(FIELD=VALUE,...)")),
        ("mlp(", ("--only 'mlp('", "KIND(FIELD=VALUE,...)")),
        ("mlp(hidden_size=x)", ("KIND(FIELD=VALUE,...)",)),
        ("mlp(**{})", ("MLP has no field 'None'",)),
        ("conv", ("unknown check 'conv'; the blocks of this kind are conv()",)),
        ("mlp(hidden_size=7)", ("no block of the suite is mlp(hidden_size=7)", "MLP(hidden_size")),
    ],
)
def test_what_selects_nothing_is_refused(cli: Cli, only: str, words: tuple[str, ...]) -> None:
    cli(*CHECK, "--only", only).assert_fails(*words)


def test_a_model_gives_blocks_their_widths(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spec = open_checkpoint(EMBEDDED / "tiny").spec
    widths = {(leaf.hidden_size, leaf.intermediate_size)
              for leaf in specs.leaves(spec) if isinstance(leaf, specs.MLP)}  # fmt: skip
    ids = "mlp,attention,short-conv,sparse-moe,layer,state-decode-batch,experts-local-ids"
    config = tmp_path / "config.json"
    shutil.copy(EMBEDDED / "tiny" / "config.json", config)
    assert "5 passed, 0 failed, 2 skipped" in cli(*CHECK, "--model", tmp_path, "--only", ids).out
    monkeypatch.setattr(feed_forward.MLP, "__call__", fails)
    done = cli(
        *CHECK, "--model", config, "--only", f"mlp,mlp(hidden_size={spec.lm_head.hidden_size})"
    )
    ((hidden, inner),) = widths
    assert f"last call: number 1 of {specs.MLP(hidden, inner)}, 0 rows" in done.out
    assert f"--model {config}\n" in done.out
    cli(*CHECK, "--model", "tiny", "--only", "mlp(hidden_size=24)").assert_fails(
        "no block of the suite is mlp(hidden_size=24)", str(specs.MLP(hidden, inner))
    )
    cli(*CHECK, "--model", "tinny").assert_fails("tinny", "tiny")


def test_of_a_models_widths_there_are_few_experts_and_rows(cli: Cli) -> None:
    done = cli(*CHECK, "--model", "tiny", "--only", "rows-among-100000,random-calls")
    assert "2 skipped" in done.out
    assert "take gigabytes" in done.out
    widths = Widths.of_model(open_checkpoint(EMBEDDED / "tiny").spec)
    for spec in (WIDE_MOE, replace(WIDE_MOE.experts, local_experts=(31, 7, 30))):
        wide = resized(spec, widths)
        experts = wide.experts if isinstance(wide, specs.SparseMoe) else wide
        assert isinstance(experts, specs.Experts)
        assert experts.num_experts == 5
        assert experts.local_experts
