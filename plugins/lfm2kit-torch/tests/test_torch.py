"""The conformance suite on `torch`, and what the suite cannot know of it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="PyTorch is not installed; pip install torch")
pytest.importorskip("lfm2kit_torch", reason="the plugin is not installed")

import lfm2kit_torch
import torch
from lfm2kit_torch import attention
from lfm2kit_torch.backend import TorchBackend
from lfm2kit_torch.exact import LIBRARIES, in_float32
from lfm2kit_torch.host import Host
from lfm2kit_torch.linear import stored
from torch.profiler import profile

import lfm2kit
import lfm2kit.testing
from lfm2kit.backend import BF16, F16, F32, Batch, Context, Format, Room, Weights
from lfm2kit.specs import MLP, Attention, Choice, Experts, LMHead, RMSNorm, ShortConv, Spec
from lfm2kit.testing.random_inputs import random_inputs
from lfm2kit.testing.random_weights import random_weights

ATTENTION = Attention(24, 4, 2, 6, 5000.0, 1e-5)


@lfm2kit.testing.parametrize_backend_checks("torch")
def test_conformance(check: Callable[[], None]) -> None:
    check()


def backend(context: Context | None = None) -> TorchBackend:
    return TorchBackend(Host(context or Context()))


def built(spec: Spec) -> Any:
    return backend().build(spec, random_weights(spec))


def called(spec: Spec) -> Any:
    return built(spec)(*random_inputs(spec, np.random.default_rng(0), 5))


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(torch.float32)
    torch.backends.mkldnn.matmul.fp32_precision = "none"
    torch.backends.cuda.matmul.fp32_precision = "none"


def test_auto_never_picks_them() -> None:
    assert {plugin.preference for plugin in lfm2kit_torch.lfm2kit_backends()} == {0}


def test_without_the_backend_whose_memory_it_shares_it_says_what_to_type(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lfm2kit_torch, "find_spec", lambda name: name == "torch" or None)
    _, on_gpu = lfm2kit_torch.lfm2kit_backends()
    said = "memory of backend 'cuda', which is not installed; pip install 'lfm2kit-torch[cuda13]'"
    assert str(on_gpu.why_unavailable()).endswith(said)


def test_it_works_between_blocks_of_another_backend() -> None:
    batch = lfm2kit.Batch.of_sequences([[11, 22, 33], [44, 55]])
    with warnings.catch_warnings(action="ignore"):  # the note that it takes a promise back
        mixed = lfm2kit.load_model("tiny", "reference,moe=torch,conv=torch")
    logits = lfm2kit.load_model("tiny", "reference").logits(batch)
    np.testing.assert_allclose(mixed.logits(batch), logits, atol=1e-4)


def test_pieces_of_queries_have_the_results_of_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    block = attention.Attention(ATTENTION, random_weights(ATTENTION), Host(Context()))
    rng, shapes = np.random.default_rng(0), ((5, 4, 6), (9, 2, 6), (9, 2, 6))
    q, k, v = (torch.from_numpy(rng.normal(size=shape)).float() for shape in shapes)
    v[7] = torch.nan  # the last two rows see it
    at_once = block._attend(q, k, v)
    assert at_once.isfinite().all((1, 2)).tolist() == [True, True, True, False, False]
    for queries in (1, 2, 3):
        monkeypatch.setattr(attention, "SCORES", queries * ATTENTION.num_attention_heads * len(k))
        torch.testing.assert_close(block._attend(q, k, v), at_once, equal_nan=True)


# ---- Without a copy ----


@pytest.mark.parametrize("format", [F32, F16, BF16], ids=str)
def test_weights_stay_where_they_are(format: Format) -> None:
    values = np.array([[1.5, -2, 0.25], [3, 0, 1]], np.float32)
    weights = Weights({"weight": Weights.of_arrays({"weight": values})["weight"].stored_as(format)})
    data = weights["weight"].data
    data.flags.writeable = False
    with warnings.catch_warnings(action="error"):
        weight = stored(weights, "weight", Host(Context()))
    assert weight.data_ptr() == data.ctypes.data
    np.testing.assert_array_equal(weight.float().numpy(), values)
    assert backend().kept_bytes(LMHead(2, 3), weights) == 0


def test_weights_of_other_formats_are_widened_once_and_it_says_so() -> None:
    int8 = Format("I8", 1, np.dtype(np.int8), lambda data: data.astype(np.float32))
    tensor = lfm2kit.weights.Tensor.of_array("weight", np.ones((2, 3), np.int8), int8)
    weights = Weights({"weight": tensor})
    assert stored(weights, "weight", Host(Context())).dtype == torch.float32
    assert backend().kept_formats(LMHead(2, 3), weights) == {"weight": F32}
    assert backend().kept_bytes(LMHead(2, 3), weights) == 4 * 6


def test_arguments_and_results_share_their_memory_with_tensors() -> None:
    host, array = Host(Context()), np.arange(6, dtype=np.float32).reshape(2, 3)
    array.flags.writeable = False
    tensor = host.tensor(array)
    assert tensor.data_ptr() == array.ctypes.data
    assert np.shares_memory(host.array(tensor), array)


# ---- What the user has set ----


@contextmanager
def autocast() -> Iterator[None]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        yield


@contextmanager
def rounding() -> Iterator[None]:
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    yield


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (rounding, r"matmul\.fp32_precision is 'bf16', but .* type .*fp32_precision = 'ieee'$"),
        (autocast, r"^torch\.autocast\('cpu'\) is on, but .* call the model outside of it$"),
    ],
)
def test_products_in_fewer_bits_are_refused(setting: Any, said: str) -> None:
    block = built(MLP(8, 8))
    with setting(), pytest.raises(lfm2kit.Lfm2kitError, match=said):
        block(np.ones((3, 8), np.float32))


@pytest.mark.parametrize(
    ("device", "override", "cure"),
    [
        ("cuda", "1", "unset TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"),
        ("cuda", "0", r"type torch\.backends\.cuda\.matmul\.fp32_precision = 'ieee'"),
        ("cpu", "1", r"type torch\.backends\.mkldnn\.matmul\.fp32_precision = 'ieee'"),
    ],
)
def test_the_cure_is_the_variable_only_if_that_has_set_it(
    device: str, override: str, cure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", override)
    getattr(torch.backends, LIBRARIES[device]).matmul.fp32_precision = "tf32"
    with pytest.raises(lfm2kit.Lfm2kitError, match=f"; {cure}$"), in_float32(device):
        pass


@pytest.mark.parametrize("spec", [MLP(24, 40), Choice(8, 2, True, True, 1.5), RMSNorm(24, 1e-5)])
def test_another_default_type_changes_nothing(spec: Spec) -> None:
    before = called(spec)
    torch.set_default_dtype(torch.float64)
    np.testing.assert_array_equal(called(spec), before)


def test_gradients_are_neither_kept_nor_switched_off_for_others() -> None:
    state = built(ATTENTION).new_state(Room(1))
    called(MLP(24, 40))
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert not any(tensor.requires_grad for tensor in state)


@pytest.mark.parametrize(
    ("context", "threads"),
    [(Context(), 7), (Context(threads=1), 1), (Context(local_ranks=1000), 1)],
)
def test_pytorchs_threads_are_set_only_if_that_is_asked_for(context: Context, threads: int) -> None:
    torch.set_num_threads(7)
    assert backend(context).notes()[0].endswith(f"threads of its own: {threads}")
    assert torch.get_num_threads() == threads


def test_ranks_divide_the_cores_that_a_container_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lfm2kit_torch.host.cores", lambda: 6)
    backend(Context(local_ranks=2))
    assert torch.get_num_threads() == 3


# ---- Memory ----


def test_too_little_memory_is_pythons_error() -> None:
    said = "you tried to allocate 1407"
    with pytest.raises(MemoryError, match=said), Host(Context()).computing():
        torch.empty(1 << 45)


@pytest.mark.parametrize(
    "spec",
    [
        ShortConv(64, 3),
        Attention(64, 4, 2, 16, 1e4, 1e-5),  # all at once
        Attention(64, 16, 2, 16, 1e4, 1e-5),  # in pieces
        MLP(64, 96),
        Experts(64, 32, 32, 4, tuple(range(32))),
        LMHead(5000, 640),
    ],
    ids=str,
)
def test_a_call_needs_the_memory_that_the_backend_says(spec: Spec, tmp_path: Path) -> None:
    rows, weights = 1024, random_weights(spec)
    stored = Weights({name: weights[name].stored_as(BF16) for name in spec.parameters()})
    block = backend().build(spec, stored)
    given = random_inputs(spec, np.random.default_rng(0), rows)
    one = Batch.of_sequences([[1] * rows])
    with profile(profile_memory=True) as profiled:
        result: Any = block(*(one if isinstance(array, Batch) else array for array in given))
    peak = peak_bytes(profiled, tmp_path / "trace.json") - result.nbytes
    said = backend().scratch_bytes(spec, rows)
    assert said <= peak < 2 * said


def peak_bytes(profiled: profile, path: Path) -> int:
    """Return the most bytes that were allocated at once, beyond those before the first ones."""
    profiled.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    memory = [event for event in events if event.get("name") == "[memory]"]
    memory.sort(key=lambda event: event["ts"])
    totals = [event["args"]["Total Allocated"] for event in memory]
    return int(max(totals) - totals[0] + memory[0]["args"]["Bytes"])


@pytest.mark.parametrize("room", [Room(0), Room(3, 128)])
@pytest.mark.parametrize("spec", [ATTENTION, ShortConv(24, 3)])
def test_a_state_has_the_size_that_the_backend_says(spec: Spec, room: Room) -> None:
    state = built(spec).new_state(room)
    tensors = [one for one in state if isinstance(one, torch.Tensor)]
    assert backend().state_bytes(spec, room) == sum(tensor.nbytes for tensor in tensors)
