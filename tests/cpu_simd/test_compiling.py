"""Where kernels are kept, for which CPU they are made, and what the user hears of it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lfm2kit_cpu_simd
import lfm2kit_hybrid
import llvmlite.binding as llvm
import numba
import pytest
from lfm2kit_cpu_simd import compiling
from lfm2kit_cpu_simd.chains import CHAINS
from lfm2kit_cpu_simd.compile_steps import tell_compile_steps
from lfm2kit_cpu_simd.compiling import announced, c_function, fingerprint, kernel
from lfm2kit_cpu_simd.interrupts import remembered_interrupts
from lfm2kit_cpu_simd.machine import STORAGES
from lfm2kit_cpu_simd.one_row import PRODUCT, OneRow
from lfm2kit_cpu_simd.tile import TILE, Emitter
from llvmlite import ir
from numba import types

from lfm2kit import progress
from lfm2kit.formats import F32
from lfm2kit.kernel_cache import KernelCache, root_folder

# Vectors of 8 floats, half-precision conversions and fused multiply-adds; no AVX-512.
AVX2 = {
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": "+sse4.2,+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+popcnt",
}


HERE = {feature for feature, has in llvm.get_host_cpu_features().items() if has}
LOADING = """
from lfm2kit_cpu_simd.compiling import announced
with announced():
    import lfm2kit_cpu_simd.packing
"""


def run(home: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA_")}
    environment |= {"LFM2KIT_CACHE_DIR": str(home), **variables}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.timeout(290)
@pytest.mark.skipif("avx512f" not in HERE, reason="all tests run AVX2's kernels here, or none can")
def test_avx2_kernels_are_right(tmp_path: Path) -> None:
    generation = kept_for_tests("avx2", tmp_path)
    is_new = not generation.exists()
    done = run(generation, "-m", "lfm2kit", "run", "-v", "-b", "cpu_simd", **AVX2)
    assert done.returncode == 0, done.stdout + done.stderr
    if is_new:
        assert "cpu_simd: compiling kernels for this CPU ..." in done.stderr
        assert f"kept in '{generation}/cpu_simd'" in done.stderr


@pytest.mark.skipif(not {"avx2", "fma", "f16c"} <= HERE, reason="this CPU has no AVX2")
def test_kernels_are_compiled_once_wherever_the_sources_are(tmp_path: Path) -> None:
    home = tmp_path / "home"
    first = run(home, "-c", LOADING, **AVX2)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "cpu_simd: compiling kernels for this CPU ..." in first.stderr
    assert f"kept in '{home}/cpu_simd'" in first.stderr
    kept = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}

    elsewhere = tmp_path / "elsewhere" / "lfm2kit_cpu_simd"
    shutil.copytree(Path(lfm2kit_cpu_simd.__file__).parent, elsewhere)
    for path in elsewhere.rglob("*.py"):
        path.touch()
    other = {"PYTHONPATH": str(elsewhere.parent), "NUMBA_CACHE_DIR": str(tmp_path)}
    again = run(home, "-c", LOADING, **AVX2, **other)
    assert (again.returncode, again.stderr) == (0, "")
    assert kept == {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}

    cut, *emptied = list(kept)[::15]
    assert emptied
    cut.write_bytes(kept[cut][:-1])
    for path in emptied:
        path.write_bytes(b"")
    healed = run(home, "-c", LOADING, **AVX2)
    assert healed.returncode == 0, healed.stdout + healed.stderr
    assert healed.stderr.count("cannot be used") == 1
    assert "kept in" in healed.stderr
    assert set(kept) == {path for path in home.rglob("*") if path.is_file()}
    assert all(path.stat().st_size > 1000 for path in kept)


def kept_for_tests(name: str, otherwise: Path) -> Path:
    """Return a cache folder that these sources have from run to run, beside users' kernels.

    It takes a minute to fill.  Those of other sources are removed after a week.
    """
    folder = (root_folder() or otherwise) / f"{name}-tests"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return otherwise / name
    for generation in folder.glob("*"):
        if time.time() - generation.stat().st_mtime > 7 * 24 * 3600:
            shutil.rmtree(generation, ignore_errors=True)
    return folder / fingerprint()


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return the folder of an empty cache; `new_process` forgets what is known of it."""
    monkeypatch.setenv("LFM2KIT_CACHE_DIR", str(tmp_path))
    new_process(monkeypatch)
    return tmp_path / "cpu_simd"


def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "KERNELS", KernelCache("cpu_simd"))


def twice() -> Any:
    @kernel(types.int64(types.int64))
    def double(x: int) -> int:
        return 2 * x

    return double


def thrice() -> Any:
    @c_function(types.int64(types.int64))
    def triple(x: int) -> int:
        return 3 * x

    return triple


def test_a_damaged_c_function_is_announced_when_it_is_compiled_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with announced():
        thrice()
    for path in cache.iterdir():
        path.write_bytes(b"")
    new_process(monkeypatch)
    capfd.readouterr()
    with announced():
        assert thrice().ctypes(14) == 42
    said = capfd.readouterr().err
    assert said.count("cannot be used") == 1
    assert said.count("cpu_simd: compiling kernels for this CPU ...") == 1
    assert "kernels are ready" in said


def test_a_kept_kernel_is_not_compiled_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with announced():
        assert twice()(21) == 42
    assert re.fullmatch(
        rf"cpu_simd: compiling kernels for this CPU ...\ncpu_simd: kernels are ready after \d+ s, "
        rf"kept in '{cache}'\n",
        capfd.readouterr().err,
    )
    (kept,) = cache.iterdir()
    assert kept.name.startswith("test_compiling.double-")
    new_process(monkeypatch)
    with announced():
        assert twice()(21) == 42
    assert capfd.readouterr().err == ""


def test_a_kept_function_is_called_by_its_address(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        new_process(monkeypatch)

        @c_function(types.int64(types.int64))
        def double(x: int) -> int:
            return 2 * x

        assert double.ctypes(21) == 42
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("place", [0, 30, 100, -1])
def test_a_bit_that_flipped_in_a_kept_kernel_is_never_run(
    place: int, cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    twice()
    (kept,) = cache.iterdir()
    flipped = bytearray(kept.read_bytes())
    flipped[place] ^= 1
    kept.write_bytes(flipped)
    new_process(monkeypatch)
    assert twice()(21) == 42
    assert f"{kept.name}' cannot be used (it is damaged)" in capfd.readouterr().err
    assert compiling.KERNELS.read(kept.stem) is not None  # a whole one again


def test_what_numba_cannot_rebuild_is_compiled_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    twice()
    (kept,) = cache.iterdir()
    compiling.KERNELS.write(kept.stem, b"written by another Numba")
    new_process(monkeypatch)
    assert twice()(21) == 42
    assert "cannot be used (Numba does not rebuild it: UnpicklingError)" in capfd.readouterr().err


def test_kernels_that_cannot_be_kept_are_used_all_the_same(
    cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cache.mkdir(mode=0o777)
    cache.chmod(0o777)
    with announced():
        assert twice()(21) == 42
    not_used, compiling_line, compiled = capfd.readouterr().err.splitlines()
    assert "kernels are compiled for this run only" in not_used
    assert compiling_line == "cpu_simd: compiling kernels for this CPU ..."
    assert re.fullmatch(r"cpu_simd: kernels are ready after \d+ s", compiled)
    assert list(cache.iterdir()) == []


def test_one_rank_of_a_machine_speaks_for_all(
    cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with announced(is_quiet=True):
        twice()
    assert capfd.readouterr().err == ""


def test_a_long_compilation_shows_that_it_goes_on(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compiling, "SECONDS_BETWEEN_LINES", 0.0)
    with announced():
        twice()
    assert "cpu_simd: compiled 1 so far ...\n" in capfd.readouterr().err


class InterruptedFinaliser:
    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def test_an_interrupt_in_a_finaliser_ends_the_next_step_without_a_traceback(
    capfd: pytest.CaptureFixture[str],
) -> None:
    steps = []

    def compile_some() -> None:
        with remembered_interrupts() as raise_again:
            InterruptedFinaliser()  # Python forgets what this raises
            steps.append("after the finaliser")
            raise_again()
            steps.append("after the next step")

    with pytest.raises(KeyboardInterrupt):
        compile_some()
    assert steps == ["after the finaliser"]
    assert capfd.readouterr().err == ""


def test_what_fails_because_of_an_interrupt_is_an_interrupt() -> None:
    def compile_one() -> None:
        with remembered_interrupts():
            InterruptedFinaliser()
            raise RuntimeError("no compiled object yet")

    with pytest.raises(KeyboardInterrupt):
        compile_one()


def test_an_error_without_an_interrupt_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="no compiled object"), remembered_interrupts():
        raise RuntimeError("no compiled object")


def test_an_interrupt_in_the_last_finaliser_is_not_lost_either(cache: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), announced():
        InterruptedFinaliser()
    assert signal.getsignal(signal.SIGINT) is before


def test_the_cache_of_another_cpu_is_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    here = fingerprint.__wrapped__()
    monkeypatch.setattr("llvmlite.binding.get_host_cpu_name", lambda: "another-cpu")
    assert fingerprint.__wrapped__() != here


@pytest.mark.parametrize(
    ("setting", "counts"),
    [("NUMBA_OPT", True), ("NUMBA_BOUNDSCHECK", True), ("NUMBA_NUM_THREADS", False)],
)
def test_settings_of_numba_that_change_code_are_other_kernels(
    setting: str, counts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(setting, raising=False)
    before = fingerprint.__wrapped__()
    monkeypatch.setenv(setting, "1")
    assert (fingerprint.__wrapped__() != before) is counts


@pytest.mark.parametrize("changed", [lfm2kit_cpu_simd, lfm2kit_hybrid])
def test_a_changed_source_has_other_kernels(
    changed: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Numba alone would go on running the kernels of an old generator."""
    source = tmp_path / "tile.py"
    source.write_text("old")
    monkeypatch.setattr(changed, "__file__", str(tmp_path / "__init__.py"))
    before = fingerprint.__wrapped__("lfm2kit_hybrid")
    source.write_text("new")
    assert fingerprint.__wrapped__("lfm2kit_hybrid") != before
    source.write_text("old")
    os.utime(source, (0, 0))
    assert fingerprint.__wrapped__("lfm2kit_hybrid") == before


def assembly(triple: str, cpu: str, arguments: int, emit: Callable[..., None]) -> str:
    """Return what is emitted, as a function with that number of arguments, for another machine."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    module = ir.Module()
    module.triple = triple
    index = ir.IntType(64)
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [index] * arguments), "tile")
    builder = ir.IRBuilder(function.append_basic_block())
    emit(builder, *function.args)
    builder.ret_void()
    target = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, opt=3)
    return target.emit_assembly(llvm.parse_assembly(str(module)))


@pytest.mark.parametrize(
    ("storage", "leaves"), [(F32, False), *((s, b) for s in STORAGES[1:] for b in (False, True))]
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
    emitter = Emitter(storage, 6, vl, nv, leaves=leaves)
    text = assembly(triple, cpu, len(TILE.args), emitter.emit)
    assert text.count(multiply_add) >= 6 * nv
    assert call not in text


@pytest.mark.parametrize("storage", STORAGES)
def test_one_row_keeps_the_sums_of_all_chains_in_registers(storage: str) -> None:
    emit = OneRow(storage, 8, 2).emit_product
    text = assembly("x86_64-unknown-linux-gnu", "haswell", len(PRODUCT.args), emit)
    in_one_step = max(re.split(r"^\.LBB", text, flags=re.M), key=lambda part: part.count("vfmadd"))
    assert in_one_step.count("vfmadd") == 2 * CHAINS
    assert not re.search(r"ymm\d+.*\(%rsp\)|\(%rsp\).*ymm", text)
    assert "\tcall" not in text


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
