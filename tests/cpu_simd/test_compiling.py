"""Where kernels are kept, for which CPU they are made, and what the user hears of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import llvmlite.binding as llvm
import numba
import pytest
from lfm2kit_cpu_simd.backend import CpuSimdBackend
from lfm2kit_cpu_simd.compile_steps import tell_compile_steps
from lfm2kit_cpu_simd.compiling import fingerprint
from lfm2kit_cpu_simd.tile import STORAGES, TILE, Emitter
from llvmlite import ir

from lfm2kit import progress

assert CpuSimdBackend

# Vectors of 8 floats, half-precision conversions and fused multiply-adds; no AVX-512.
AVX2 = {
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": "+sse4.2,+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+popcnt",
}


def run(home: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA_")}
    environment |= {"XDG_CACHE_HOME": str(home), **variables}
    command = [sys.executable, "-m", "lfm2kit", "run", "-v", "-b", "cpu_simd"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.timeout(280)
def test_avx2_kernels_are_right_kept_apart_and_compiled_once(tmp_path: Path) -> None:
    if not {"avx2", "fma", "f16c"} <= {f for f, has in llvm.get_host_cpu_features().items() if has}:
        pytest.skip("this CPU has no AVX2")
    first = run(tmp_path, **AVX2)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "compiling its kernels for this CPU, once" in first.stderr
    (kept,) = (tmp_path / "lfm2kit").iterdir()
    assert f"kept in {kept}" in first.stderr
    again = run(tmp_path, **AVX2)
    assert (again.returncode, "compil" in again.stderr) == (0, False)
    assert [kept] == list((tmp_path / "lfm2kit").iterdir())


def test_the_cache_of_another_cpu_is_another_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    here = fingerprint()
    monkeypatch.setattr("llvmlite.binding.get_host_cpu_name", lambda: "another-cpu")
    assert fingerprint() != here


def test_a_changed_source_has_another_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Numba alone would go on running the kernels of an old generator."""
    source = tmp_path / "tile.py"
    source.write_text("old")
    monkeypatch.setattr("lfm2kit_cpu_simd.compiling.__file__", str(tmp_path / "compiling.py"))
    before = fingerprint()
    source.write_text("new")
    assert fingerprint() != before


def assembly(triple: str, cpu: str, vl: int, nv: int, storage: str, leaves: bool) -> str:
    """The tile, compiled for another machine."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    module = ir.Module()
    module.triple = triple
    index = ir.IntType(64)
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [index] * len(TILE.args)), "tile")
    builder = ir.IRBuilder(function.append_basic_block())
    Emitter(storage, 6, vl, nv, leaves=leaves).emit(builder, *function.args)
    builder.ret_void()
    target = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, opt=3)
    return target.emit_assembly(llvm.parse_assembly(str(module)))


@pytest.mark.parametrize(
    ("storage", "leaves"), [("F32", False), *((s, b) for s in STORAGES[1:] for b in (False, True))]
)
@pytest.mark.parametrize(
    ("triple", "cpu", "vl", "nv", "multiply_add", "call"),
    [
        ("aarch64-unknown-linux-gnu", "neoverse-n1", 4, 4, "fmla", "\tbl\t"),
        ("arm64-apple-macosx14", "apple-m1", 4, 4, "fmla", "\tbl\t"),
        ("x86_64-unknown-linux-gnu", "haswell", 8, 2, "vfmadd", "\tcall"),
        ("x86_64-unknown-linux-gnu", "skylake-avx512", 16, 4, "vfmadd", "\tcall"),
        ("x86_64-unknown-linux-gnu", "znver4", 16, 4, "vfmadd", "\tcall"),
    ],
)
def test_the_tile_lowers_to_fused_multiply_adds_and_calls_nothing(
    triple: str,
    cpu: str,
    vl: int,
    nv: int,
    multiply_add: str,
    call: str,
    storage: str,
    leaves: bool,
) -> None:
    text = assembly(triple, cpu, vl, nv, storage, leaves)
    assert text.count(multiply_add) >= 6 * nv
    assert call not in text


def test_each_kernel_that_is_compiled_is_a_step_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    tell_compile_steps()
    mine = progress.Progress()
    told: list[tuple[str, float]] = []
    mine.on_step = lambda: told.append((mine.now.name, mine.now.seconds))
    monkeypatch.setattr(progress, "THIS_PROCESS", mine)

    @numba.njit
    def inner(x):  # type: ignore[no-untyped-def]
        return x + 1

    @numba.njit
    def outer(x):  # type: ignore[no-untyped-def]
        return inner(x)

    assert outer(1) == 2
    long, short = progress.COMPILING, progress.DEADLINE
    assert told == [
        ("compiling outer", long), ("compiling inner", long), ("compiling outer", long),
        ("compiled its kernels", short),
    ]  # fmt: skip
