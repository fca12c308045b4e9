"""The host's memory is bounded as a device's is: too little is refused before anything is built."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from typing import Any

import pytest

from lfm2kit.batch import Batch
from lfm2kit.building.loading import Setup, set_up
from lfm2kit.building.options import Options
from lfm2kit.building.placement import Placed
from lfm2kit.checkpoint import Checkpoint
from lfm2kit.errors import Lfm2kitError
from lfm2kit.formats import BF16, F32, Format
from lfm2kit.memory import HostMemory
from lfm2kit.transport import World
from lfm2kit.weights import Weights
from tests.random_model import RANDOM

BATCH = Batch.of_sequences([[1, 2, 3], [4, 5]])


def stored_as(format: Format) -> Checkpoint:
    """Return the embedded model in another type; the expert bias is always float32."""
    tensors = {n: t if t.format == F32 else t.stored_as(format) for n, t in RANDOM.weights.items()}
    return replace(RANDOM, weights=Weights(tensors))


def setup(checkpoint: Checkpoint = RANDOM, plan: str = "cpu_simd", **options: Any) -> Setup:
    return set_up(checkpoint, Options(backend=plan, **options))


def kept(of: Setup) -> int:
    return of.sizes.needed(of.placed, "host").kept


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Set how many bytes this machine has left, shared by all ranks."""

    def set_free(nbytes: int) -> None:
        monkeypatch.setattr(HostMemory, "free_bytes", lambda self, ranks=1: nbytes // ranks)

    return set_free


@pytest.mark.parametrize("plan", ["cpu_simd", "reference", "cpu_simd,moe=reference"])
@pytest.mark.parametrize("stored", [BF16, F32], ids=str)
def test_blocks_keep_what_was_said_before_they_were_built(stored: Format, plan: str) -> None:
    """To within the padding of panels, and the objects around the arrays."""
    here = setup(stored_as(stored), plan)
    for leaf in here.placed.leaves():
        here.builder().build(leaf)  # whatever comes with the first one
        taken = min(bytes_taken(here, leaf) for _ in range(3))  # other threads take some as well
        said = here.sizes.kept(leaf)
        assert said is not None
        assert said <= taken <= 1.25 * said + 30_000, leaf.name


def bytes_taken(here: Setup, leaf: Placed) -> int:
    """Return the bytes that this process took, and kept, while it built a block."""
    tracemalloc.start()
    block = here.builder().build(leaf)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del block
    return taken


def test_a_precision_halves_what_is_stored_in_float32_and_nothing_else() -> None:
    assert kept(setup(precision="bf16")) == kept(setup())
    wide = stored_as(F32)
    assert kept(setup(wide, precision="bf16")) / kept(setup(wide)) == pytest.approx(0.5, rel=0.02)


def test_a_model_too_large_for_this_machine_is_refused_before_it_is_built(free: Any) -> None:
    built: list[object] = []
    free(kept(setup()) - 1)
    with pytest.raises(Lfm2kitError, match=r"memory 'host' is too small: the model needs 5\.29 MB"):
        setup().build(built.append)
    assert built == []
    free(kept(setup()))
    assert setup().build(built.append).logits(BATCH).shape == (2, 1024)


def test_what_is_proposed_is_enough_for_this_machine(free: Any) -> None:
    free(kept(setup(stored_as(F32), precision="bf16")))
    assert str(setup(stored_as(F32)).shortage()).endswith("missing; try precision='bf16'")
    free(kept(setup()) - 1)
    assert str(setup().shortage()).endswith("no precision or n_cpu_moe is enough")


def test_views_of_the_checkpoint_count_nothing(free: Any) -> None:
    free(kept(setup()) // 10)
    assert setup(plan="reference").build().logits(BATCH).shape == (2, 1024)


def test_a_forward_of_too_many_tokens_is_refused_with_what_to_change(free: Any) -> None:
    free(20_000_000)
    assert setup().shortage(1000) is None
    sentence = str(setup().shortage(1_000_000))
    assert "the model with 1000000 tokens at once needs" in sentence
    assert "a smaller batch" in sentence


def test_ranks_on_one_machine_share_its_memory(free: Any) -> None:
    free(2 * kept(setup()))

    class OneOfSeveral:
        """A rank of a job of its own, on a machine that it shares."""

        def __init__(self, ranks: int) -> None:
            self.world = World(0, 1, 0, ranks)

    def of(ranks: Any) -> Setup:
        return set_up(RANDOM, Options(backend="cpu_simd"), transport=ranks)

    assert of(OneOfSeveral(2)).shortage() is None
    assert of(OneOfSeveral(3)).shortage() is not None


def test_no_rank_takes_memory_before_all_have_asked_what_is_free() -> None:
    order: list[str] = []

    class Ranks:
        world = World(0, 2)

        def barrier(self) -> None:
            order.append("all have asked")

        def all_to_all(self, rows: Any, send_counts: Any, *known: Any) -> Any:
            return rows, send_counts

    ranks: Any = Ranks()
    set_up(RANDOM, Options(backend="reference"), transport=ranks).build(
        lambda leaf: order.append("built")
    )
    assert order[:2] == ["all have asked", "built"]
    assert order.count("all have asked") == 1
