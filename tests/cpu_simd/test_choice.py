"""The choice of experts, bit by bit, as a block and as machine code."""

from __future__ import annotations

import ctypes
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import pytest
from lfm2kit_cpu_simd.backend import CpuSimdBackend
from lfm2kit_cpu_simd.chooser import MOST_TAKEN, Emitter
from llvmlite import ir

from lfm2kit.backend import CallsNatively, Context
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.specs import Choice, Router
from lfm2kit.weights import Weights

Arrays = tuple[Any, Any]

NATIVE = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 3)
SIZES = [(e, k) for e in (1, 5, 12, 32, 33, 64) for k in range(1, 9) if k <= e]
NAN = np.float32(np.nan)


def expected(spec: Choice, bias: Any, scores: Any) -> Arrays:
    """Return what the contract says, expert by expert, in the contract's order."""
    expert_ids = np.empty((len(scores), spec.num_experts_per_tok), np.int32)
    expert_weights = np.empty(expert_ids.shape, np.float32)
    for r, row in enumerate(scores):
        is_nan = bool(np.isnan(row).any())
        biased = (np.zeros_like(row) if is_nan else row) + bias
        order = sorted(range(spec.num_experts), key=lambda e: (-biased[e], e))
        taken = order[: spec.num_experts_per_tok]
        total = np.float32(0)
        for e in taken:
            total += row[e]
        divisor = total + np.float32(1e-6) if spec.norm_topk_prob else np.float32(1)
        expert_ids[r] = taken
        expert_weights[r] = row[taken] / divisor * np.float32(spec.routed_scaling_factor)
        if is_nan:
            expert_weights[r] = NAN
    return expert_ids, expert_weights


def scores_of(rng: np.random.Generator, experts: int) -> Any:
    """Return rows of 0 to 1: random ones, many that are equal, extreme ones, and some with NaN."""
    random = rng.random((40, experts), dtype=np.float32)
    equal = rng.integers(0, 3, (40, experts)).astype(np.float32) / 2
    extreme = rng.choice(
        np.array([0, -0.0, 1e-45, 1e-38, 1e-7, 1 - 2**-24, 1], np.float32), (40, experts)
    )
    lost = random.copy()
    lost[rng.random(lost.shape) < 1 / experts] = NAN
    lost[0] = NAN
    rows = np.concatenate([random, equal, extreme, lost])
    return rows[rng.permutation(len(rows))]


def biases_of(rng: np.random.Generator, experts: int, taken: int) -> list[Any]:
    """Return None, small ones, ones that outweigh scores, zeros of both signs, and -inf."""
    small = rng.standard_normal(experts).astype(np.float32) / 10
    zeros = np.where(rng.random(experts) < 0.5, np.float32(0), np.float32(-0.0))
    never = small.copy()
    never[rng.permutation(experts)[taken:]] = -np.inf
    return [None, small, 100 * small, zeros, never]


def natively(
    spec: Choice, block: CallsNatively, scores: Any, parts: list[int], of: int, behind: int = 0
) -> Arrays:
    """Call a block's machine code; results have some rows `behind` those of the scores."""
    shape = (len(scores) + behind, spec.num_experts_per_tok)
    results = np.full(shape, -7, np.int32), np.full(shape, -7, np.float32)
    native = block.native()
    inputs = np.array([scores.ctypes.data], np.uintp)
    outputs = np.array([result.ctypes.data for result in results], np.uintp)
    for part in parts:
        NATIVE(native.function)(
            native.argument, inputs.ctypes.data, outputs.ctypes.data, len(scores), part, of
        )
    return results


def assert_bits(got: Arrays, want: Arrays) -> None:
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one.view(np.int32), other.view(np.int32))


@pytest.mark.parametrize(("experts", "taken"), SIZES)
def test_every_choice_has_the_contracts_bits(experts: int, taken: int) -> None:
    rng = np.random.default_rng([experts, taken])
    backend = CpuSimdBackend(Context())
    for bias in biases_of(rng, experts, taken):
        spec = Choice(experts, taken, bias is not None, bool(taken % 3), 1.5)
        weights = Weights.of_arrays({} if bias is None else {"expert_bias": bias})
        block = backend.build(spec, weights)
        assert isinstance(block, CallsNatively)
        scores = scores_of(rng, experts)
        want = expected(spec, np.float32(0) if bias is None else bias, scores)
        assert_bits(block(scores), want)
        assert_bits(natively(spec, block, scores, [2, 0, 1], 3), want)
        reference_ids, _ = ReferenceBackend().build(spec, weights)(scores)
        np.testing.assert_array_equal(want[0], reference_ids)


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 5, 7, 8, 15, 16, 17, 100])
@pytest.mark.parametrize(("experts", "taken"), [(5, 3), (32, 4), (33, 8), (40, 9)])
def test_lanes_choose_as_row_by_row_and_write_nothing_behind(
    experts: int, taken: int, rows: int
) -> None:
    rng = np.random.default_rng([experts, taken, rows])
    spec = Choice(experts, taken, False, True, 1.0)
    block: Any = CpuSimdBackend(Context()).build(spec, Weights.of_arrays({}))
    assert bool(block.chooser) == (taken <= MOST_TAKEN)
    some_nan = scores_of(rng, experts)[:rows]
    no_nan = np.where(np.isnan(some_nan), np.float32(0.5), some_nan)
    by_lanes = [natively(spec, block, scores, [1, 0], 2, behind=9) for scores in (some_nan, no_nan)]
    block.chooser = 0
    for scores, got in zip((some_nan, no_nan), by_lanes, strict=True):
        assert_bits(got, natively(spec, block, scores, [0], 1, behind=9))
        assert (got[0][rows:] == -7).all()
        assert (got[1][rows:] == -7).all()


def module_of_lanes(taken: int, vl: int) -> ir.Module:
    module = ir.Module()
    index, truth = ir.IntType(64), ir.IntType(1)
    arguments = [*[index] * 5, ir.FloatType(), *[index] * 2]
    function = ir.Function(module, ir.FunctionType(truth, arguments), "choose")
    builder = ir.IRBuilder(function.append_basic_block())
    builder.ret(Emitter(taken, vl).emit(builder, *function.args))
    return module


@pytest.mark.parametrize("vl", [4, 8, 16])
@pytest.mark.parametrize(("experts", "taken"), [(12, 3), (32, 4), (33, 8)])
def test_vectors_of_any_length_choose_the_same(experts: int, taken: int, vl: int) -> None:
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten()
    )
    module = llvm.parse_assembly(str(module_of_lanes(taken, vl)))
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    integer = ctypes.c_int64
    function = ctypes.CFUNCTYPE(ctypes.c_bool, *[integer] * 5, ctypes.c_float, *[integer] * 2)(
        engine.get_function_address("choose")
    )
    rng = np.random.default_rng([experts, taken])
    bias = rng.standard_normal(experts).astype(np.float32) / 10
    scores = scores_of(rng, experts)
    spec = Choice(experts, taken, True, True, 1.5)
    for start in range(0, len(scores), vl):
        x = scores[start : start + vl]
        got = np.empty((len(x), taken), np.int32), np.empty((len(x), taken), np.float32)
        at = [array.ctypes.data for array in (x, bias, *got)]
        is_chosen = function(len(x), at[0], experts, at[1], 1, 1.5, *at[2:])
        assert is_chosen == (not np.isnan(x).any())
        if is_chosen:
            assert_bits(got, expected(spec, bias, x))


@pytest.mark.parametrize(
    ("triple", "cpu", "vl", "compare", "call"),
    [
        ("aarch64-unknown-linux-gnu", "neoverse-n1", 4, "fcmg", "\tbl\t"),
        ("x86_64-unknown-linux-gnu", "haswell", 8, "vcmp", "\tcall"),
        ("x86_64-unknown-linux-gnu", "sapphirerapids", 16, "vcmp", "\tcall"),
    ],
)
def test_lanes_lower_to_vector_comparisons_and_call_nothing(
    triple: str, cpu: str, vl: int, compare: str, call: str
) -> None:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    target = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, opt=3)
    module = module_of_lanes(4, vl)
    module.triple = triple
    text = target.emit_assembly(llvm.parse_assembly(str(module)))
    assert text.count(compare) >= 4 * vl
    assert call not in text


@pytest.mark.parametrize("rows", [0, 1, 2, 9])
def test_parts_share_the_rows_whatever_their_number(rows: int) -> None:
    rng = np.random.default_rng(rows)
    spec = Choice(32, 4, False, True, 1.0)
    block = CpuSimdBackend(Context()).build(spec, Weights.of_arrays({}))
    scores = rng.random((rows, 32), dtype=np.float32)
    for parts in (1, 2, 8):
        order = list(map(int, rng.permutation(parts)))
        assert_bits(natively(spec, block, scores, order, parts), block(scores))
    lacking = natively(spec, block, scores, [0, 1, 3, 4, 5, 6, 7], 8)[0]
    shares = [rows * part // 8 for part in (2, 3)]
    assert (lacking[slice(*shares)] == -7).all()
    assert (np.delete(lacking, slice(*shares), axis=0) >= 0).all()


def test_a_router_chooses_as_its_parts_do(threads: int) -> None:
    rng = np.random.default_rng(0)
    spec = Router(24, 33, 8, True, True, 1.5)
    arrays = {n: rng.standard_normal(s, dtype=np.float32) for n, s in spec.parameters().items()}
    weights = Weights.of_arrays(arrays)
    backend = CpuSimdBackend(Context(threads=threads))
    router, scores, choice = (backend.build(s, weights) for s in (spec, spec.scores, spec.choice))
    for rows in (0, 1, 2, 300):
        x = 10 * rng.standard_normal((rows, 24), dtype=np.float32)
        x[:1, 0] = NAN
        assert_bits(router(x), choice(scores(x)))
