"""Experts on a device and on the host at once, on a device that is a thread with random delays."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from lfm2kit_cpu_simd.backend import CpuSimdBackend
from lfm2kit_hybrid.backend import HybridBackend

from lfm2kit import specs
from lfm2kit.backend import Batch, Block, Context, Spec, Weights
from lfm2kit.building.inspecting import fault_in_a_forward
from lfm2kit.building.results import Checked
from lfm2kit.model import LFM2
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.rewrites import Places
from lfm2kit.rewrites.experts_split import experts_split
from lfm2kit.testing.device import DeviceMemory
from tests.conformance.crossing import DeviceBackend
from tests.core.small import build, random_weights, small_spec
from tests.core.test_model import SEQUENCES

PLACES = {2: Places((0, 3), (4,)), 3: Places((1,), (2, 0))}
BATCH = Batch.of_sequences(SEQUENCES)
HOST, DEVICE = (4,), (1, 2)  # of layer 2: the host's part, and the resident one


def hybrid(gpu: DeviceBackend) -> HybridBackend:
    backends: dict[str, Any] = {"cuda": gpu, "cpu_simd": CpuSimdBackend(Context())}
    return HybridBackend(Context(create_backend=backends.__getitem__))


def model_of(plan: str, gpu: DeviceBackend | None = None, host: Any = None, **builder: Any) -> LFM2:
    gpu = gpu or DeviceBackend(DeviceMemory(1e-4))
    there = {"hybrid": hybrid(gpu), "device": gpu, "cpu_simd": CpuSimdBackend(Context())}
    backends = {**there, "host": host or ReferenceBackend()}
    return build(small_spec(), plan, backends, rewrites=[experts_split(PLACES)], **builder)


@pytest.mark.parametrize("default", ["hybrid", "device"])
@pytest.mark.parametrize("others", ["", ",streamed_experts=host", ",experts=host"])
def test_a_split_model_has_the_same_bits_with_and_without_crossings(
    default: str, others: str
) -> None:
    """With crossings it is captured; several parts of a layer may be crossed to."""
    gpu = DeviceBackend(DeviceMemory(1e-4))
    model = model_of(f"{default},host_experts=host{others}", gpu)
    expected = build(small_spec(), rewrites=[experts_split(PLACES)]).logits(BATCH)
    for _ in range(8):
        np.testing.assert_array_equal(model.logits(BATCH), expected)
    assert len(gpu.replays) == (default == "hybrid")


def test_experts_of_cpu_simd_are_called_in_the_midst_of_the_devices_work() -> None:
    model = model_of("hybrid,host_experts=cpu_simd")
    whole, first = build(small_spec()).logits(BATCH), model.logits(BATCH)
    np.testing.assert_allclose(first, whole, rtol=0, atol=2e-5)
    for _ in range(5):
        np.testing.assert_array_equal(model.logits(BATCH), first)


def test_a_host_part_that_is_crossed_to_is_looked_at_before_the_first_forward() -> None:
    def found(host: Any) -> str | None:
        blocks: list[Checked] = []
        model = model_of("hybrid,host_experts=host", host=host, checked=blocks)
        return fault_in_a_forward(model, blocks, random_weights(small_spec()))

    class WrongOrder(ReferenceBackend):
        def build(self, spec: Spec, weights: Weights) -> Block:
            block = super().build(spec, weights)
            return lambda *inputs: np.asfortranarray(block(*inputs))

    assert found(CpuSimdBackend(Context())) is None
    says = "layers.2.feed_forward.experts.host: the Experts block of backend 'host' returned a resu"
    assert (found(WrongOrder()) or "").startswith(says)


def test_a_sample_has_the_same_bits_alone_in_a_batch_and_permuted() -> None:
    model = model_of("hybrid,host_experts=host")
    together = model.logits(BATCH)
    for _ in range(2):
        for i, sequence in enumerate(SEQUENCES):
            alone = model.logits(Batch.of_sequences([sequence]))
            np.testing.assert_array_equal(alone[0], together[i])
        permuted = model.logits(Batch.of_sequences(SEQUENCES[::-1]))
        np.testing.assert_array_equal(permuted, together[::-1])


class Meeting:
    """Where the parts of a layer have to be at the same time, once it is called."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=20)
        self.is_called = False

    def block(self, block: Callable[..., Any]) -> Block:
        def met(*inputs: Any) -> Any:
            if self.is_called:
                self.barrier.wait()
            return block(*inputs)

        return met


def meeting(kind: type[ReferenceBackend], ids: tuple[int, ...], at: Meeting) -> Any:
    """Return a kind of backend whose block of these experts waits for the other one."""

    class Meets(kind):  # type: ignore[misc, valid-type]
        def build(self, spec: Spec, weights: Weights) -> Block:
            built: Any = super().build(spec, weights)
            if not isinstance(spec, specs.Experts) or spec.local_experts != ids:
                return built
            if isinstance(self, DeviceBackend):
                built.block = at.block(built.block)  # in the device's thread
                return built
            return at.block(built)

    return Meets


@pytest.mark.parametrize("default", ["hybrid", "device"])
def test_the_host_and_the_device_work_at_the_same_time(default: str) -> None:
    """Each of the two waits for the other: one after the other, neither would ever end."""
    at = Meeting()
    gpu = meeting(DeviceBackend, DEVICE, at)(DeviceMemory(1e-4))
    model = model_of(f"{default},host_experts=host", gpu, meeting(ReferenceBackend, HOST, at)())
    expected = build(small_spec(), rewrites=[experts_split(PLACES)]).logits(BATCH)
    at.is_called = default == "device"  # the first call of a crossing waits
    for _ in range(4):
        np.testing.assert_array_equal(model.logits(BATCH), expected)
        at.is_called = True


def test_a_host_part_that_fails_names_its_layer_and_the_next_forward_is_right() -> None:
    class Fails(ReferenceBackend):
        is_failing = False

        def build(self, spec: Spec, weights: Weights) -> Block:
            block = super().build(spec, weights)

            def call(*inputs: Any) -> Any:
                if self.is_failing:
                    raise ValueError("no more")
                return block(*inputs)

            return call

    host = Fails()
    model = model_of("hybrid,host_experts=host", host=host)
    expected = model.logits(BATCH)
    for _ in range(2):
        host.is_failing = True
        with pytest.raises(RuntimeError, match=r"layers\.2\.feed_forward\.experts\.host raised Va"):
            model.logits(BATCH)
        host.is_failing = False
        np.testing.assert_array_equal(model.logits(BATCH), expected)
