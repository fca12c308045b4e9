"""Plans as text and as TOML: what fits which block, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfm2kit import specs
from lfm2kit.batch import Batch
from lfm2kit.building.placement import Placer
from lfm2kit.building.plan import KINDS, Plan
from lfm2kit.errors import Lfm2kitError
from lfm2kit.model import JOINS
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.specs import Spec
from tests.core.small import build, small_spec


def test_the_last_rule_that_fits_wins() -> None:
    plan = Plan.parse("a,moe=b,2-4.moe=c,3=d,attn=e")
    assert plan.backend_for(None, "embed") == "a"
    assert plan.backend_for(0, "choice") == "b"
    assert plan.backend_for(2, "experts") == "c"
    assert plan.backend_for(3, "experts") == "d"
    assert plan.backend_for(3, "norm") == "d"
    assert plan.backend_for(3, "attn") == "e"


def test_a_rule_for_layers_says_nothing_of_what_lies_outside_them() -> None:
    assert Plan.parse("a,0-9=b").backend_for(None, "norm") == "a"


@pytest.mark.parametrize(
    ("kind", "backends"),
    [("router", "bba"), ("scores", "baa"), ("choice", "aba"), ("experts", "aab"), ("moe", "bbb")],
)
def test_scores_choice_and_experts_can_be_told_apart(kind: str, backends: str) -> None:
    plan = Plan.parse(f"a,{kind}=b")
    leaves = ("scores", "choice", "experts")
    assert "".join(plan.backend_for(1, leaf) for leaf in leaves) == backends


def test_a_layer_may_have_zeros_in_front() -> None:
    assert Plan.parse("a,0000000000012.moe=b") == Plan.parse("a,12.moe=b")


@pytest.mark.parametrize("backend", [":bf16", "a:", "a:bf16:fp32", ":"])
def test_a_precision_stands_after_a_backend(backend: str) -> None:
    for text in (backend, f"a,moe={backend}"):
        with pytest.raises(Lfm2kitError, match=f"plan item '{backend}': expected a backend"):
            Plan.parse(text)


rules = st.builds(
    lambda layers, kind, backend: f"{layers}{'.' if layers else ''}{kind}={backend}",
    st.sampled_from(["", "3", "0-2", "1-1"]),
    st.sampled_from(sorted(KINDS)),
    st.sampled_from(["x", "my-backend", "b_2", "x:bf16"]),
)


@given(st.lists(rules, max_size=5))
def test_a_plan_says_itself_as_text(items: list[str]) -> None:
    plan = Plan.parse(",".join(["default", *items]))
    assert Plan.parse(str(plan)) == plan


def test_a_toml_file_says_the_same_as_text(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(
        'default = "a"\n'
        '[[rule]]\nlayers = "2-4"\nkind = "moe"\nbackend = "b"\n'
        '[[rule]]\nlayers = 3\nbackend = "c"\n'
        '[[rule]]\nkind = "attn"\nbackend = "d"\n'
    )
    assert Plan.read(path) == Plan.parse("a,2-4.moe=b,3=c,attn=d")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "default"),
        ("moe=a", "moe=a"),
        ("a,moe", "moe"),
        ("a,mow=b", "Did you mean 'moe'"),
        ("a,2-x.moe=b", "2-x"),
        ("a,4-2.moe=b", "4-2"),
        ("a,moe=", "moe="),
        ("a,,moe=b", "''"),
        ("a,-1.moe=b", "-1"),
        ("a,0-9223372036854775807=b", "up to 1023"),
        ("a,1024.moe=b", "up to 1023"),
        ("a,0-" + "9" * 4301 + "=b", "up to 1023"),
        ("a,1_0.moe=b", "1_0"),
        ("a" + ",moe=b" * 4097, "4097 rules"),
        ("a,\u0663.moe=b", "\u0663"),
    ],
)
def test_bad_text_names_the_item(text: str, named: str) -> None:
    with pytest.raises(Lfm2kitError, match=named):
        Plan.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "default = 3",
        "rule = 3",
        'default = "a"\nrules = []',
        'default = "a"\n[[rule]]\nkind = "moe"',
        'default = "a"\n[[rule]]\nlayer = 3\nbackend = "b"',
        "default = ",
        "default = " + "9" * 4301,
        "default = " + "[" * 3000,
        'default = "a"\n[[rule]]\nbackend = 3',
        'default = "a"\n[[rule]]\nlayers = true\nbackend = "b"',
        'default = "a"\n[[rule]]\nlayers = 9223372036854775807\nbackend = "b"',
        'default = "a"\n[[rule]]\nlayers = "0-9223372036854775807"\nbackend = "b"',
        'default = "a"\n' + '[[rule]]\nbackend = "b"\n' * 4097,
    ],
)
def test_a_bad_toml_plan_is_one_line_that_names_the_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(text)
    with pytest.raises(Lfm2kitError, match=r"plan\.toml") as caught:
        Plan.read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("item", ["9.moe=b", "2-4.moe=b", "0.moe=b", "0-1.experts=b", "0.attn=b"])
def test_a_rule_that_fits_no_block_is_an_error(item: str) -> None:
    with pytest.raises(Lfm2kitError, match=item.replace(".", r"\.")):
        Plan.parse(f"a,{item}").check(small_spec())


def test_experts_of_the_first_moe_layers_on_the_cpu() -> None:
    on_host = {"a": "cpu", "a:bf16": "cpu:bf16"}.__getitem__
    plan = Plan.parse("a").with_cpu_experts(1, small_spec(), on_host)
    assert [plan.backend_for(i, "experts") for i in range(4)] == ["a", "a", "cpu", "a"]
    assert plan.backend_for(2, "scores") == "a"
    with pytest.raises(Lfm2kitError, match="2 MoE layers"):
        Plan.parse("a").with_cpu_experts(3, small_spec(), on_host)
    plan = Plan.parse("a,3.moe=a:bf16").with_cpu_experts(2, small_spec(), on_host)
    assert [plan.backend_for(i, "experts") for i in (2, 3)] == ["cpu", "cpu:bf16"]


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        ("a", "a,host_experts=cpu"),
        ("a:bf16", "a:bf16,host_experts=cpu:bf16"),
        ("a,3.moe=a:bf16", "a,3.moe=a:bf16,2.host_experts=cpu,3.host_experts=cpu:bf16"),
        ("a,host_experts=b", "a,host_experts=b"),
        ("a,2.host_experts=b", "a,2.host_experts=b,3.host_experts=cpu"),
    ],
)
def test_the_hosts_part_of_split_experts_is_on_the_host_where_no_rule_names_it(
    plan: str, expected: str
) -> None:
    on_host = {"a": "cpu", "a:bf16": "cpu:bf16"}.__getitem__
    assert str(Plan.parse(plan).with_host_experts([2, 3], on_host)) == expected


class MlpAndHead(ReferenceBackend):
    def why_unsupported(self, spec: Spec) -> str | None:
        return None if spec.kind in ("mlp", "head") else "it builds MLP and LMHead"


class NoHead(ReferenceBackend):
    def why_unsupported(self, spec: Spec) -> str | None:
        return "no head" if spec.kind == "head" else super().why_unsupported(spec)


@pytest.mark.parametrize(
    ("plan", "advice"),
    [
        ("few", "reference,mlp=few,head=few"),
        ("few,0.conv=reference", "reference,mlp=few,head=few"),
        ("few,moe=most", "reference,mlp=few,moe=most,head=few"),
        ("few,router=most", "reference,mlp=few,router=most,head=few"),
        ("most", "most,head=reference"),
        ("most,0-1.mlp=few,2.conv=few", "most,mlp=few,head=reference"),
        ("most,1.mlp=few", "most,1.mlp=few,head=reference"),
        ("reference,conv=few", "reference"),
        ("reference,3=few", "reference"),
    ],
)
def test_the_advice_for_a_partial_backend_covers_all_that_it_lacks(plan: str, advice: str) -> None:
    backends = {"few": MlpAndHead(), "most": NoHead()}
    with pytest.raises(Lfm2kitError) as raised:
        build(small_spec(), plan, backends)
    hint = str(raised.value).partition(". Try backend=")[2].strip("'")
    assert hint == advice
    logits = build(small_spec(), hint, backends).logits(Batch.of_sequences([[3, 1, 4]]))
    assert np.isfinite(logits).all()


def test_all_blocks_that_backends_lack_are_said_at_once_in_few_words() -> None:
    backends = {"few": MlpAndHead(), "most": NoHead()}
    with pytest.raises(Lfm2kitError) as raised:
        build(small_spec(), "few,moe=most,head=most", backends)
    assert str(raised.value) == (
        "backend 'few' lacks embed, norm of layers 0-3 and embedding_norm, conv of layers 0, 2, "
        "attn of layers 1, 3, rows (it builds MLP and LMHead); backend 'most' lacks head "
        "(no head); reference can build them. "
        "Try backend='reference,mlp=few,moe=most,head=few'"
    )


def test_layers_that_a_backend_builds_stay_with_it() -> None:
    class SomeConvs(ReferenceBackend):
        def why_unsupported(self, spec: Spec) -> str | None:
            is_long = isinstance(spec, specs.ShortConv) and spec.kernel_size > 3
            return "its kernel has 3 taps" if is_long else super().why_unsupported(spec)

    spec = small_spec()
    layers = list(spec.layers)
    conv = replace(layers[2].operator, kernel_size=4)  # type: ignore[attr-defined]
    layers[2] = replace(layers[2], operator=conv)  # type: ignore[type-var]
    spec = replace(spec, layers=tuple(layers))
    for plan, hint in (
        ("some", "some,2.conv=reference"),
        ("reference,conv=some", "reference,0.conv=some"),
    ):
        with pytest.raises(Lfm2kitError) as raised:
            build(spec, plan, {"some": SomeConvs()})
        said = "layers.2.operator: backend 'some' has no ShortConv block (its kernel has 3 taps); "
        assert str(raised.value) == f"{said}reference can build it. Try backend='{hint}'"


def test_what_nobody_builds_has_no_advice() -> None:
    placer = Placer(Plan.parse("most"), {"most": NoHead()}.__getitem__, JOINS, ["most"])
    with pytest.raises(Lfm2kitError) as raised:
        placer.place(small_spec())
    says = (
        "lm_head: backend 'most' has no LMHead block (no head); no installed backend can build it"
    )
    assert str(raised.value) == says
