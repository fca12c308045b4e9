"""What a backend gets wrong is named with its block, and reaches no other block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lfm2kit import specs
from lfm2kit.backend import Block, Spec, Weights
from lfm2kit.batch import Batch
from lfm2kit.errors import Lfm2kitError
from lfm2kit.reference.backend import ReferenceBackend
from tests.core.small import build, small_spec

BATCH = Batch.of_sequences([[3, 1, 4], [1]])
Change = Callable[[Any], Any]


class Wrong(ReferenceBackend):
    """A backend that builds the blocks of one type of spec as `change` makes them."""

    def __init__(self, spec: type[Spec], change: Change) -> None:
        self.spec = spec
        self.change = change

    def build(self, spec: Spec, weights: Weights) -> Block:
        block = super().build(spec, weights)
        return self.change(block) if type(spec) is self.spec else block


def returning(change: Change) -> Change:
    """Make a block whose result is changed, and that keeps its state."""

    def changed(block: Any) -> Any:
        def call(*inputs: Any) -> Any:
            return change(block(*inputs))

        if hasattr(block, "new_state"):
            call.new_state = block.new_state  # type: ignore[attr-defined]
        return call

    return changed


@pytest.mark.parametrize(
    ("spec", "change", "says"),
    [
        (
            specs.Embedding,
            lambda x: x[:-1],
            r"embed_tokens: the Embedding block of backend 'wrong' returned an array \[3, 24\], "
            r"but must return an array \[4, 24\]",
        ),
        (specs.ShortConv, lambda x: None, "layers.0.operator: .* returned None, but"),
        (specs.Attention, lambda x: x.T, r"layers.1.operator: .* array \[24, 4\], but"),
        (specs.MLP, lambda x: x[:, :-1], r"layers.0.feed_forward: .* \[4, 23\], but"),
        (specs.RMSNorm, lambda both: both[1], "returned an array .* must return 2 arrays"),
        (specs.RMSNorm, list, "layers.0.operator_norm: .* returned list, but"),
        (specs.Choice, lambda both: (both[0], None), "router.choice: .* returned ndarray, None"),
        (specs.Router, lambda both: both[::2], r"returned an array \[4, 3\], but must return 2"),
        (specs.Experts, lambda x: (x,) * 2, "returned 2 arrays .* but must return an array"),
        (specs.LastRows, lambda both: (both[0][:1], both[1]), r"\[1, 24\] and \[2, 24\], but"),
        (specs.LMHead, lambda x: x[:, 1:], r"lm_head: .* \[2, 49\], but must .* \[2, 50\]"),
    ],
)
def test_a_result_that_is_not_as_the_spec_says_names_block_and_backend(
    spec: type[Spec], change: Change, says: str
) -> None:
    plan = f"reference,{spec.kind}=wrong"
    model = build(small_spec(), plan, {"wrong": Wrong(spec, returning(change))})
    with pytest.raises(Lfm2kitError, match=says) as error:
        model.logits(BATCH)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spec", "change", "says"),
    [
        (
            specs.MLP,
            lambda x: x.astype(np.float64),
            r"layers.0.feed_forward: the MLP block of backend 'wrong' returned an array \[4, 24\] "
            r"of float64, but must return an array \[4, 24\] of float32",
        ),
        (specs.Embedding, lambda x: x.astype(np.float16), r"of float16, but must .* of float32"),
        (
            specs.Router,
            lambda both: (both[0].astype(np.int64), both[1]),
            r"2 arrays \[4, 3\] of int64 and \[4, 3\] of float32, but must return 2 arrays "
            r"\[4, 3\] of int32 and \[4, 3\] of float32",
        ),
        (specs.RMSNorm, lambda both: (both[0], both[1].astype(np.int32)), "and .* of int32, but"),
    ],
)
def test_a_result_of_another_type_names_block_and_backend(
    spec: type[Spec], change: Change, says: str
) -> None:
    model = build(
        small_spec(), f"reference,{spec.kind}=wrong", {"wrong": Wrong(spec, returning(change))}
    )
    with pytest.raises(Lfm2kitError, match=says):
        model.logits(BATCH)


@pytest.mark.parametrize("spec", [specs.Embedding, specs.RMSNorm, specs.MLP, specs.LMHead])
def test_a_result_that_is_wrong_only_later_is_not_believed(spec: type[Spec]) -> None:
    is_wrong = False

    def change(result: Any) -> Any:
        if not is_wrong:
            return result
        return tuple(x[:-1] for x in result) if isinstance(result, tuple) else result[:-1]

    plan = f"reference,{spec.kind}=wrong"
    model = build(small_spec(), plan, {"wrong": Wrong(spec, returning(change))})
    model.logits(BATCH)
    is_wrong = True
    with pytest.raises(Lfm2kitError, match=f"the {spec.__name__} block of backend 'wrong'"):
        model.logits(BATCH)


def test_arrays_of_another_kind_than_numpys_are_judged_by_their_shapes_alone() -> None:
    class Foreign(np.ndarray):
        """An array whose type has no NumPy name, as torch's have none."""

        @property
        def dtype(self) -> Any:
            return "torch.float32"

    plan, change = "reference,mlp=wrong", returning(lambda x: x.view(Foreign))
    model = build(small_spec(), plan, {"wrong": Wrong(specs.MLP, change)})
    right = build(small_spec(), "reference").logits(BATCH)
    np.testing.assert_array_equal(np.asarray(model.logits(BATCH)), right)


def test_no_block_is_called_after_one_with_a_wrong_result() -> None:
    called: list[str] = []

    def wrap(name: str, spec: Spec, block: Block) -> Block:
        return lambda *inputs: (called.append(name), block(*inputs))[1]

    backend = Wrong(specs.ShortConv, returning(lambda x: x[:-1]))
    with pytest.raises(Lfm2kitError, match=r"layers\.0\.operator"):
        build(small_spec(), "wrong", {"wrong": backend}, wrap=wrap).logits(BATCH)
    assert called[-1] == "layers.0.operator"


@pytest.mark.parametrize(
    ("spec", "block", "says"),
    [
        (
            specs.Attention,
            lambda block: lambda x, batch: x,
            "cannot be called with its 3 arguments",
        ),
        (
            specs.LMHead,
            lambda block: None,
            "lm_head: .* its 1 arguments, .* None is not a callable",
        ),
        (specs.ShortConv, lambda block: lambda *x: x, r"has no method new_state\(room\)"),
    ],
)
def test_a_block_that_cannot_be_called_is_refused_when_it_is_built(
    spec: type[Spec], block: Change, says: str
) -> None:
    with pytest.raises(Lfm2kitError, match=says):
        build(small_spec(), "wrong", {"wrong": Wrong(spec, block)})


def test_a_new_state_that_takes_no_room_is_refused_when_it_is_built() -> None:
    def change(block: Any) -> Any:
        call = returning(lambda x: x)(block)
        call.new_state = lambda: None
        return call

    says = r"layers.0.operator: .* 'wrong' cannot be called with new_state\(room\)"
    with pytest.raises(Lfm2kitError, match=says):
        build(small_spec(), "wrong", {"wrong": Wrong(specs.ShortConv, change)})
