"""Every backend against transformers: logits of all positions, and what the routers chose.

The cases and what each guards: `scripts/make_oracle.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfm2kit import specs
from lfm2kit.backend import Batch, Block, Spec
from lfm2kit.building.builder import build_model
from lfm2kit.building.loading import Setup, set_up
from lfm2kit.building.options import Options
from lfm2kit.building.plugins import installed_plugins
from lfm2kit.checkpoint import Checkpoint, open_checkpoint
from lfm2kit.formats import F32
from lfm2kit.model import LFM2
from lfm2kit.state import Room

ORACLE = Path(__file__).parents[1] / "oracle"
CASES = sorted(path.name for path in ORACLE.iterdir())
PLUGINS = installed_plugins()
BACKENDS = ["reference", *(n for n in ("cpu_simd", "hybrid") if n in PLUGINS.backends)]
TOLERANCE = {"reference": 2e-5, "cpu_simd": 1e-4, "hybrid": 1e-4}  # of logits of std 3

both = pytest.mark.parametrize("backend", BACKENDS)


class Expected:
    """A case's checkpoint and the arrays of its expected.npz, by sequence."""

    def __init__(self, case: str) -> None:
        self.checkpoint: Checkpoint = open_checkpoint(ORACLE / case)
        arrays = np.load(ORACLE / case / "expected.npz")
        count = sum(name.startswith("ids_") for name in arrays)
        self.sequences = [{n: arrays[f"{n}_{i}"] for n in NAMES} for i in range(count)]

    def last_logits(self) -> Any:
        return np.stack([sequence["logits"][-1] for sequence in self.sequences])

    def ids(self) -> list[Any]:
        return [sequence["ids"] for sequence in self.sequences]


NAMES = ("ids", "rows", "logits", "experts", "weights")


@cache
def expected(case: str) -> Expected:
    return Expected(case)


@cache
def setup(case: str, plan: str) -> Setup:
    return set_up(expected(case).checkpoint, Options(backend=plan), plugins=PLUGINS)


@cache
def model(case: str, plan: str) -> LFM2:
    return setup(case, plan).build()


def every_row(batch: Batch) -> Batch:
    """Return the same batch, asking for the logits of all its rows."""
    return replace(batch, logits_rows=np.arange(batch.tokens, dtype=np.int32))


@both
@pytest.mark.parametrize("case", CASES)
def test_logits_of_every_position(case: str, backend: str) -> None:
    for sequence in expected(case).sequences:
        batch = every_row(Batch.of_sequences([sequence["ids"]]))
        logits = model(case, backend).logits(batch)[sequence["rows"]]
        np.testing.assert_allclose(logits, sequence["logits"], rtol=0, atol=TOLERANCE[backend])


@both
@pytest.mark.parametrize("case", [c for c in CASES if "dense" not in c or "no_dense" in c])
def test_routers_choose_and_weigh_as_the_oracles_do(case: str, backend: str) -> None:
    """Ids come in order of score, and weights do not contain the bias."""
    for sequence in expected(case).sequences:
        chosen = list(routings(case, backend, sequence["ids"]))
        assert len(chosen) == len(sequence["experts"])
        for (ids, weights), want, want_weights in zip(
            chosen, sequence["experts"], sequence["weights"], strict=True
        ):
            np.testing.assert_array_equal(ids, want)
            assert ids.dtype == np.int32
            np.testing.assert_allclose(weights, want_weights, rtol=1e-4, atol=1e-6)


def routings(case: str, backend: str, token_ids: Any) -> Iterator[Any]:
    """Return what a forward's routers gave, layer by layer, between reference blocks."""
    seen: list[Any] = []

    def remembering(name: str, spec: Spec, block: Block) -> Block:
        if not isinstance(spec, specs.Router):
            return block

        def remembered(x: Any) -> Any:
            seen.append([np.array(array) for array in block(x)])
            return seen[-1]

        return remembered

    one = setup(case, f"reference,router={backend}")
    watched = build_model(one.placed, replace(one.builder(), wrap=remembering), "reference")
    watched.logits(Batch.of_sequences([token_ids]))
    return iter(seen)


@both
def test_a_bias_rounded_to_bfloat16_would_choose_otherwise(backend: str) -> None:
    """Guards the case itself: it tells a 16-bit bias from a float32 one."""
    case = expected("router_bias_stays_float32")
    name = "layers.1.feed_forward.expert_bias"
    bias = case.checkpoint.weights[name]
    assert bias.format == F32
    rounded = (bias.data.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    assert len(np.unique(rounded)) < len(np.unique(bias.data))


@both
def test_ids_do_not_depend_on_the_number_of_rows(backend: str) -> None:
    case = expected("router_ids_at_any_batch_size")
    ids = case.ids()[0]
    for rows in (1, 8, 9, 33, 128):
        got = [r[0] for r in routings("router_ids_at_any_batch_size", backend, ids[:rows])]
        np.testing.assert_array_equal(got, case.sequences[0]["experts"][:, :rows])


@both
def test_a_sequence_alone_packed_or_permuted_gives_the_same_bits(backend: str) -> None:
    case = expected("sequences_of_many_lengths")
    lfm2 = model("sequences_of_many_lengths", backend)
    ids = case.ids()
    alone = np.concatenate([lfm2.logits(Batch.of_sequences([one])).copy() for one in ids])
    packed = lfm2.logits(Batch.of_sequences(ids)).copy()
    np.testing.assert_array_equal(packed, alone)
    order = np.random.default_rng(5).permutation(len(ids))
    permuted = lfm2.logits(Batch.of_sequences([ids[i] for i in order]))
    np.testing.assert_array_equal(permuted, alone[order])
    np.testing.assert_allclose(alone, case.last_logits(), rtol=0, atol=TOLERANCE[backend])


@both
@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
def test_decoding_in_chunks_gives_the_logits_of_one_forward(backend: str, chunk: int) -> None:
    """Several sequences at once, in pages of their own, each going on from what they hold."""
    case = expected("sequences_of_many_lengths")
    lfm2 = model("sequences_of_many_lengths", backend)
    ids = case.ids()
    pages = np.random.default_rng(chunk).permutation(len(ids) + 2)[: len(ids)]
    state = lfm2.new_state(Room(len(ids) + 2, 64))
    for start in range(0, 40, chunk):
        going = [i for i, one in enumerate(ids) if start < len(one)]
        if not going:
            break
        batch = Batch.of_sequences(
            [ids[i][start : start + chunk] for i in going],
            starts=[start] * len(going),
            pages=[[pages[i]] for i in going],
        )
        logits = lfm2.logits(batch, state)
        for i, got in zip(going, logits, strict=True):
            last = min(start + chunk, len(ids[i])) - 1
            np.testing.assert_allclose(
                got, case.sequences[i]["logits"][last], rtol=0, atol=TOLERANCE[backend]
            )


@both
def test_packed_and_separate_experts_give_the_same_bits(backend: str) -> None:
    ids = expected("experts_stored_apart").ids()
    apart = model("experts_stored_apart", backend).logits(Batch.of_sequences(ids)).copy()
    packed = model("experts_stored_packed", backend).logits(Batch.of_sequences(ids))
    np.testing.assert_array_equal(apart, packed)
