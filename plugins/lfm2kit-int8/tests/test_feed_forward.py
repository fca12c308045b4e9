"""Kernels of int8 weights beside slow twins in float64, and in the cases that kernels get wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numba
import numpy as np
import numpy.typing as npt
import pytest
from lfm2kit_int8.backend import Int8Backend
from lfm2kit_int8.feed_forward import Experts
from lfm2kit_int8.formats import I8
from lfm2kit_int8.packing import pack
from lfm2kit_int8.products import product
from lfm2kit_int8.tile import MOST_ROWS, compiled_tile

import lfm2kit
from lfm2kit import specs
from lfm2kit.backend import Context, Tensor, Weights

Float32 = npt.NDArray[np.float32]
RNG = np.random.default_rng(0)
RELEASE = 2048, 1792  # hidden_size and intermediate_size of an expert


def matrix(name: str, out: int, k: int) -> Tensor:
    data = RNG.integers(-127, 128, (out, k)).astype(np.int8)
    scales = RNG.uniform(0.5, 1, out).astype(np.float32) / np.float32(127 * np.sqrt(k))
    return Tensor(name, I8, (out, k), data, (scales,))


def weights_of(spec: specs.Spec) -> Weights:
    return Weights({name: matrix(name, *shape) for name, shape in spec.parameters().items()})


def experts(hidden: int = 70, inner: int = 40, count: int = 6, local: str = "023") -> specs.Experts:
    return specs.Experts(hidden, inner, count, 2, tuple(map(int, local)))


def rows_of(count: int, k: int) -> Float32:
    return RNG.standard_normal((count, k)).astype(np.float32)


def twin_of_mlp(x: Float32, weights: Weights) -> npt.NDArray[np.float64]:
    w1, w3, w2 = (weights.float32(f"{name}.weight").astype(float) for name in ("w1", "w3", "w2"))
    gate = x @ w1.T
    delta: npt.NDArray[np.float64] = gate / (1 + np.exp(-gate)) * (x @ w3.T) @ w2.T
    return delta


def twin_of_experts(
    spec: specs.Experts, x: Float32, ids: npt.NDArray[np.int32], chosen: Float32, weights: Weights
) -> npt.NDArray[np.float64]:
    delta = np.zeros(x.shape)
    for row, k in np.ndindex(ids.shape):
        if (e := int(ids[row, k])) in spec.local_experts:
            one = twin_of_mlp(x[row : row + 1], weights.scope(f"experts.{e}"))
            delta[row] += chosen[row, k] * one[0]
    return delta


def assert_close(got: Float32, want: npt.NDArray[np.float64]) -> None:
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=3e-6 * np.abs(want).max(initial=1e-9))


@contextmanager
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill new arrays with NaN: what a kernel does not write is seen."""
    with monkeypatch.context() as patched:
        patched.setattr(np, "empty", lambda shape, dtype=float: np.full(shape, np.nan, dtype))
        yield


@pytest.mark.parametrize("k", [1, 7, 8, 9, 63, 64, 65, 130])
@pytest.mark.parametrize("out", [1, 15, 16, 17, 31, 33, 64, 65])
@pytest.mark.parametrize("is_gated", [False, True])
def test_products_astride_the_edges_of_tiles(
    k: int, out: int, is_gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two groups, of which the first has one row more than two tiles, and the last has one."""
    groups = [[matrix("w", out, k) for _ in range(1 + is_gated)] for _ in range(2)]
    panels, x = pack(groups), rows_of(2 * MOST_ROWS + 2, k)
    offsets, order = np.array([0, len(x) - 1, len(x)]), RNG.permutation(len(x))
    with poisoned(monkeypatch):
        got = product(x, order, offsets, panels)
    for number, tensors in enumerate(groups):
        chosen = slice(*offsets[number : number + 2])
        first, *other = (x[order[chosen]] @ t.float32().astype(float).T for t in tensors)
        want = first / (1 + np.exp(-first)) * other[0] if is_gated else first
        assert_close(got[chosen], want)


@pytest.mark.parametrize(("vl", "m"), [(4, 6), (16, 6)])
def test_tiles_of_other_cpus(vl: int, m: int) -> None:
    """A vector that is too long for this CPU becomes several: the sums are right all the same."""
    tile, w, x = compiled_tile(m, vl), matrix("w", 4, 150), rows_of(m, 150)
    panels = pack([[Tensor("w", I8, (64, 150), np.repeat(w.data, 16, 0), (np.ones(64, "f4"),))]])
    xs = np.array([row.ctypes.data for row in x])
    sums = np.full((m, 4, 16), np.nan, np.float32)
    tile.ctypes(xs.ctypes.data, panels.data.ctypes.data, 150, sums.ctypes.data)
    assert_close(sums[:, :, 0], x.astype(float) @ w.data.T)


@pytest.mark.parametrize("rows", [0, 1, MOST_ROWS, MOST_ROWS + 1, 17])
def test_a_dense_feed_forward(rows: int) -> None:
    spec = specs.MLP(70, 100)
    weights, x = weights_of(spec), rows_of(rows, 70)
    assert_close(Int8Backend(Context()).build(spec, weights)(x), twin_of_mlp(x, weights))


def test_an_expert_of_the_releases_size() -> None:
    spec = specs.MLP(*RELEASE)
    weights, x = weights_of(spec), rows_of(2, RELEASE[0])
    assert_close(Int8Backend(Context()).build(spec, weights)(x), twin_of_mlp(x, weights))


IDS: dict[str, Callable[[int], npt.NDArray[np.int64]]] = {
    "any": lambda rows: RNG.integers(0, 6, (rows, 2)),
    "one expert has all rows": lambda rows: np.full((rows, 2), 2),
    "an expert has none": lambda rows: RNG.choice([0, 3], (rows, 2)),
    "of nobody": lambda rows: np.full((rows, 2), -1),
    "of others": lambda rows: RNG.choice([1, 4, 5], (rows, 2)),
    "some of nobody": lambda rows: RNG.choice([-1, 0, 3], (rows, 2)),
    "one of each row": lambda rows: RNG.integers(0, 6, (rows, 1)),
}


@pytest.mark.parametrize("kind", IDS)
@pytest.mark.parametrize("rows", [0, 1, 19])
def test_experts(kind: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, x = experts(), rows_of(rows, 70)
    weights, ids = weights_of(spec), IDS[kind](rows).astype(np.int32)
    chosen = RNG.uniform(0, 1, ids.shape).astype(np.float32)
    block = Int8Backend(Context()).build(spec, weights)
    assert isinstance(block, Experts)
    with poisoned(monkeypatch):
        got = block(x, ids, chosen)
    assert_close(got, twin_of_experts(spec, x, ids, chosen, weights))
    given = np.full_like(x, np.nan)
    block.fill([given], x, ids, chosen)
    np.testing.assert_array_equal(got.view(np.int32), given.view(np.int32))


def test_without_local_experts_nothing_is_added() -> None:
    block = Int8Backend(Context()).build(experts(local=""), Weights({}))
    delta = block(rows_of(3, 70), np.zeros((3, 2), np.int32), np.ones((3, 2), np.float32))
    np.testing.assert_array_equal(delta, np.zeros((3, 70)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_no_number_stays_alone(bad: float) -> None:
    spec = specs.MLP(70, 40)
    block, x = Int8Backend(Context()).build(spec, weights_of(spec)), rows_of(9, 70)
    want = block(x)
    x[4, 69] = bad
    got = block(x)
    others = np.arange(9) != 4
    np.testing.assert_array_equal(got[others], want[others])
    assert not np.any(np.isfinite(got[4]))


def test_what_lies_behind_a_row_is_not_multiplied() -> None:
    """A line of 70 values has 58 of padding, whose weights are 0: 0 * NaN would be seen."""
    spec = specs.MLP(70, 40)
    block = Int8Backend(Context()).build(spec, weights_of(spec))
    around = np.full((3, 70), np.nan, np.float32)
    around[1] = rows_of(1, 70)
    assert np.all(np.isfinite(block(around[1:2])))


def test_a_row_has_its_bits_alone_and_among_any_number_of_others() -> None:
    spec = specs.MLP(137, 90)
    block, x = Int8Backend(Context()).build(spec, weights_of(spec)), rows_of(20, 137)
    alone = np.concatenate([block(x[i : i + 1]) for i in range(20)])
    for rows in range(1, 21):
        np.testing.assert_array_equal(block(x[:rows]), alone[:rows])


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    spec = specs.MLP(70, 200)
    weights, x = weights_of(spec), rows_of(9, 70)
    before, results = numba.get_num_threads(), []
    for most in (1, numba.config.NUMBA_NUM_THREADS):
        backend = Int8Backend(Context(threads=most))
        assert numba.get_num_threads() == most
        results.append(backend.build(spec, weights)(x))
    Int8Backend(Context(threads=before))
    np.testing.assert_array_equal(*results)


# Prints how many threads the blocks of each context have started.
THREADS = """
import os
import numba
import numpy as np
from lfm2kit.backend import Context
from lfm2kit.specs import Experts
from lfm2kit.testing import random_inputs, random_weights
from lfm2kit_cpu_simd.crew import CREW
from lfm2kit_int8.backend import Int8Backend
CREW._waits = dict  # other processes do not count here
spec = Experts(64, 64, 4, 2, (0, 1, 2, 3))
weights, inputs = random_weights(spec), random_inputs(spec, np.random.default_rng(0), 200)
for context in (Context(threads=1), Context(local_ranks=5000), Context(threads=2)):
    block = Int8Backend(context).build(spec, weights)
    before = len(os.listdir("/proc/self/task"))
    block(*inputs)
    print(len(os.listdir("/proc/self/task")) - before if numba.threading_layer() == "omp" else "?")
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="only Linux counts them so")
def test_kernels_run_on_as_many_threads_as_are_asked_for() -> None:
    environment = {**os.environ, "NUMBA_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", THREADS], env=environment, capture_output=True, text=True
    )
    if "?" in done.stdout:
        pytest.skip("this machine has no OpenMP, and other threads are started in advance")
    assert done.stdout.split() == ["0", "0", "1"], done.stderr


def test_more_threads_than_numba_has_are_refused() -> None:
    most = numba.config.NUMBA_NUM_THREADS
    with pytest.raises(lfm2kit.Lfm2kitError, match=f"this process may use {most}"):
        Int8Backend(Context(threads=most + 1))


def test_float_weights_are_rounded_and_int8_ones_are_taken_as_they_are() -> None:
    data = RNG.integers(-50, 51, (33, 70)).astype(np.int8)  # rounded again, they would reach 127
    stored = Tensor("w", I8, data.shape, data, (np.full(33, 0.3, np.float32),))
    values = Tensor.of_array("w", stored.float32())
    eye, all_rows = np.eye(70, dtype=np.float32), np.arange(70)
    for tensor, kept in ((stored, stored), (values, values.stored_as(I8))):
        got = product(eye, all_rows, np.array([0, 70]), pack([[tensor]]))
        np.testing.assert_array_equal(got.T, kept.float32())


@pytest.mark.parametrize("spec", [specs.MLP(70, 100), experts(), experts(local="")])
def test_kept_bytes_are_those_of_panels_and_scales(spec: specs.Spec) -> None:
    weights, backend = weights_of(spec), Int8Backend(Context())
    block = backend.build(spec, weights)
    inside = getattr(block, "_feed_forward", None) or getattr(block, "_experts", None)
    panels = [inside._w13, inside._w2] if inside else []
    assert backend.kept_bytes(spec, weights) == sum(p.data.nbytes + p.scales.nbytes for p in panels)
