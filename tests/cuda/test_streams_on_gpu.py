"""Streams and threads on a real GPU, with a device and a host that are late on purpose.

Where a wait keeps results right, the test is run without it too, and must then see wrong ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import pytest
from lfm2kit_cuda import nvrtc
from lfm2kit_cuda.compiling import architecture_name
from lfm2kit_cuda.requirements import why_unavailable

from lfm2kit.backend import Context
from lfm2kit.batch import Batch
from lfm2kit.building.loading import set_up
from lfm2kit.building.options import Options
from lfm2kit.model import LFM2
from tests.random_model import RANDOM, build_random

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable())),
]

LATE = 200_000  # microseconds, of a kernel; whatever the host does meanwhile takes a few thousand
SIZE = 1000
TURNS = 30

SOURCE = """
__device__ long long nanoseconds() {
  long long now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

extern "C" __global__ void late_copy(const float* from, float* to, int size, int microseconds) {
  const long long end = nanoseconds() + 1000ll * microseconds;
  while (nanoseconds() < end) {}
  for (int i = threadIdx.x; i < size; i += blockDim.x) to[i] = from[i];
}
"""


@cache
def late_copy() -> Callable[[Any, Any, int], None]:
    """Return a kernel of one CTA that copies `SIZE` floats after this many microseconds."""
    from cupy.cuda.function import Module
    from lfm2kit_cuda.device import compute_capability
    from lfm2kit_cuda.kernels import Kernel

    architecture = architecture_name(*compute_capability())
    module = Module()
    module.load(
        nvrtc.compile_cubin(SOURCE, "late_copy.cu", (f"--gpu-architecture={architecture}",))
    )
    kernel = Kernel(module.get_function("late_copy"))
    return lambda source, target, late: kernel((1,), 256, source, target, SIZE, late)


def memory() -> Any:
    from lfm2kit_cuda.memory import memory_of

    return memory_of(0)


@pytest.fixture
def arrays() -> Iterator[tuple[Any, Any, Any]]:
    """Yield values on the host and on the device, and an array of -1 there; all of it done."""
    import cupy

    values = np.random.default_rng(0).random(SIZE, np.float32)
    source, target = cupy.asarray(values), cupy.full(SIZE, -1, cupy.float32)
    late_copy()(source, cupy.empty_like(source), 0)  # compiled and loaded
    cupy.cuda.Device().synchronize()
    yield values, source, target
    cupy.cuda.Device().synchronize()


@pytest.mark.parametrize("waits", [True, False])
def test_what_one_stream_makes_late_another_one_waits_for(arrays: Any, waits: bool) -> None:
    values, source, target = arrays
    with memory().stream():
        late_copy()(source, target, LATE)
        made = memory().mark()
        with memory().stream():
            if waits:
                memory().wait(made)
            got = memory().to_host(target)
    assert np.array_equal(got, values if waits else np.full(SIZE, -1))


@pytest.mark.parametrize("waits", [True, False])
def test_a_copy_that_was_started_waits_for_the_device_and_the_host_for_it(
    arrays: Any, waits: bool
) -> None:
    values, source, target = arrays
    with memory().stream():
        late_copy()(source, target, LATE)
        arriving = memory().start_to_host(target)
        arriving._host[...] = -2
        got = (arriving.wait() if waits else arriving._host).copy()
    assert np.array_equal(got, values if waits else np.full(SIZE, -2))


def test_a_copy_that_nobody_waits_for_writes_no_other_array(arrays: Any) -> None:
    import cupy
    import cupyx

    _, source, target = arrays
    with memory().stream():
        late_copy()(source, target, LATE)
        arriving = memory().start_to_host(target)
        place = arriving._host.ctypes.data
        del arriving
        other = cupyx.empty_pinned(SIZE, np.float32)
        other[...] = 7
        cupy.cuda.get_current_stream().synchronize()
    assert other.ctypes.data == place, "the pool gave other memory: the test shows nothing"
    assert (other == 7).all()


@pytest.mark.parametrize("waits", [True, False])
def test_a_host_that_is_ahead_waits_before_it_fills_a_buffer_again(
    arrays: Any, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lfm2kit_cuda import upload

    def fill_at_once(self: Any, buffer: int, piece: Any) -> int:
        np.copyto(self._buffers[buffer][: len(piece)], piece)
        return buffer

    if not waits:
        monkeypatch.setattr(upload.InPieces, "_fill", fill_at_once)
    _, source, target = arrays
    sent = [np.full(SIZE, i, np.float32) for i in range(3 * upload.BUFFERS)]
    with memory().stream():
        late_copy()(source, target, LATE)
        there = [memory().from_host(array) for array in sent]
        got = [memory().to_host(array) for array in there]
    assert waits == all(map(np.array_equal, got, sent))


@pytest.mark.parametrize("waits", [True, False])
def test_a_batch_that_is_copied_late_is_ready_in_another_stream(
    arrays: Any, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lfm2kit_cuda.memory import CudaMemory

    if not waits:
        monkeypatch.setattr(CudaMemory, "wait", lambda self, mark: None)
    _, source, target = arrays
    batch = Batch.of_sequences([np.arange(1, SIZE) + 7 * waits])  # what freed memory does not hold
    with memory().stream():
        late_copy()(source, target, LATE)
        batch.on(memory()).token_ids  # noqa: B018
        with memory().stream():
            got = memory().to_host(batch.on(memory()).token_ids)
    assert waits == np.array_equal(got, batch.token_ids)


def test_the_clock_of_marks_is_the_devices(arrays: Any) -> None:
    _, source, target = arrays
    with memory().stream():
        before = memory().mark()
        late_copy()(source, target, LATE)
        after = memory().mark()
    assert after.seconds_since(before) >= 0.99e-6 * LATE


# Whole models.


def model_of(precision: str) -> LFM2:
    checkpoint = RANDOM
    return set_up(checkpoint, Options(backend="cuda", precision=precision)).build()


def random_batch(seed: int, *lengths: int) -> Batch:
    rng = np.random.default_rng(seed)
    return Batch.of_sequences([rng.integers(1024, size=n, dtype=np.int32) for n in lengths])


SHAPES = ((16, 5), (1,), (33, 2, 7), (16, 16, 16, 16))


def logits_of(model: LFM2, seed: int) -> list[Any]:
    """Return the results of plain forwards, captures and replays of several shapes."""
    got = []
    for turn in range(TURNS):
        batch = random_batch(1000 * seed + turn, *SHAPES[turn % len(SHAPES)])
        got.append(model.logits(batch).copy())
        if turn % 5 == 0:
            got.append(model.home.to_host(model.forward(batch.on(model.home))).copy())
    return got


def assert_bits(one: list[Any], other: list[Any]) -> None:
    assert all(map(np.array_equal, one, other))


@pytest.mark.parametrize("precisions", [("fp32", "fp32"), ("fp32", "bf16")])
def test_two_threads_run_two_models(precisions: tuple[str, str]) -> None:
    want = [logits_of(model_of(p), seed) for seed, p in enumerate(precisions)]
    models = [model_of(p) for p in precisions]  # their graphs are captured at once
    with ThreadPoolExecutor(2) as threads:
        got = list(threads.map(logits_of, models, range(2)))
    for one, other in zip(got, want, strict=True):
        assert_bits(one, other)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_threads_run_one_model(precision: str) -> None:
    want = [logits_of(model_of(precision), seed) for seed in range(2)]
    model = model_of(precision)
    with ThreadPoolExecutor(2) as threads:
        got = list(threads.map(logits_of, [model, model], range(2)))
    for one, other in zip(got, want, strict=True):
        assert_bits(one, other)


def test_two_threads_load_and_run_models_at_once() -> None:
    want = [logits_of(model_of("fp32"), seed) for seed in range(2)]
    with ThreadPoolExecutor(2) as threads:
        got = list(threads.map(lambda seed: logits_of(model_of("fp32"), seed), range(2)))
    for one, other in zip(got, want, strict=True):
        assert_bits(one, other)


def test_replays_in_two_streams_behind_a_late_kernel(arrays: Any) -> None:
    """The first has not begun when the second is asked for; each result is its own."""
    _, source, target = arrays
    model, batches = build_random("cuda"), [random_batch(seed, 16, 5) for seed in range(4)]
    want = [model.logits(batch).copy() for batch in batches]
    replay = model.backend.capture(model.forward, batches[0])  # type: ignore[attr-defined]
    with memory().stream():
        late_copy()(source, target, LATE)
        arriving = [memory().start_to_host(replay(batches[0]))]
        with memory().stream():
            arriving += [memory().start_to_host(replay(batch)) for batch in batches[1:]]
    assert_bits([copy.wait() for copy in arriving], want)


def test_a_forward_does_not_wait_for_the_legacy_stream(arrays: Any) -> None:
    import cupy

    _, source, target = arrays
    model, batch = build_random("cuda"), random_batch(0, 16, 5)
    with memory().stream():
        want = model.logits(batch).copy()
        plain = model.home.to_host(model.forward(batch.on(model.home))).copy()
    late_copy()(source, target, 10 * LATE)
    late = cupy.cuda.Event()
    late.record()
    with memory().stream():
        assert_bits([model.logits(batch)], [want])
        assert_bits([model.home.to_host(model.forward(batch.on(model.home)))], [plain])
    assert not late.done


# Devices.


def devices() -> int:
    import cupy

    return int(cupy.cuda.runtime.getDeviceCount())


def needs_two_devices() -> None:
    if devices() < 2:
        pytest.skip("it takes two GPUs")


def model_on(device: int) -> LFM2:
    import cupy

    with cupy.cuda.Device(device):
        return build_random("cuda")


def test_a_model_stays_on_its_device_whoever_calls_it() -> None:
    needs_two_devices()
    import cupy

    want, model = logits_of(model_on(0), 0), model_on(1)
    assert model.home.name == "lfm2kit_cuda:1"
    with ThreadPoolExecutor(1) as thread:
        assert_bits(thread.submit(logits_of, model, 0).result(), want)
    assert_bits(logits_of(model, 0), want)
    assert cupy.cuda.runtime.getDevice() == 0


def test_two_threads_run_models_on_two_devices() -> None:
    needs_two_devices()
    want = [logits_of(model_on(0), seed) for seed in range(2)]
    models = [model_on(0), model_on(1)]
    with ThreadPoolExecutor(2) as threads:
        got = list(threads.map(logits_of, models, range(2)))
    for one, other in zip(got, want, strict=True):
        assert_bits(one, other)


def test_each_device_has_an_identity_of_its_own() -> None:
    from lfm2kit_cuda.choosing import identity

    units = {identity(device) for device in range(devices())}
    assert len(units) == devices()
    assert all("UUID" in unit for unit in units)


def test_ranks_of_a_machine_take_one_device_after_the_other() -> None:
    import cupy
    from lfm2kit_cuda.backend import CudaBackend

    for rank in range(devices() + 1):
        backend = CudaBackend(Context(local_ranks=devices() + 1, local_rank=rank))
        assert backend._memory.device == rank % devices()
    cupy.cuda.runtime.setDevice(0)
