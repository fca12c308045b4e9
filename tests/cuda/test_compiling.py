"""Every kernel compiles for every architecture: NVRTC needs no GPU."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from lfm2kit_cuda import compiling, nvrtc, parts
from lfm2kit_cuda.compiling import SOURCES, architecture_name, compile_source, waits_for_previous
from lfm2kit_cuda.constants import EXPERTS

from lfm2kit import progress, specs
from lfm2kit.errors import Lfm2kitError
from lfm2kit.kernel_cache import KernelCache

pytestmark = pytest.mark.skipif(
    nvrtc.why_unavailable() is not None, reason=str(nvrtc.why_unavailable())
)

ALL = ("sm_75", "sm_80", "sm_90a", "sm_100")
FROM_SM_80 = ALL[1:]
HALVES = {
    "bf16": {"HALF": "BF16", "MMA_TYPE": '"bf16"', "GATED_SCALE": "1.0f"},
    "fp16": {"HALF": "F16", "MMA_TYPE": '"f16"', "GATED_SCALE": "0.015625f"},
}
# Threads of these part before they wait: those that copy, those that multiply.
PARTED = ("gemm90", "few_rows90")
# few_rows waits before it reads a list of tiles, and without one after it has asked for weights.
WAYS = dict.fromkeys((*PARTED, "few_rows"), 2)
WAIT, LET_NEXT_START = "griddepcontrol.wait", "griddepcontrol.launch_dependents"
LOW = {"MOST_ROWS": 32, "MOST_ROWS_OF_TERMS": 32}  # of gemm90's tiles
PLAINLY = {"F16": ("sm_75",), "BF16": ("sm_80", "sm_100")}  # gemm16's chips
CONV = {"KERNEL_SIZE": 3, "WINDOW": 18, "VECTOR": 4}
HEADS = {"HEADS": 32, "KV_HEADS": 8, "HEAD_DIM": 64}
ODD_HEADS = {"HEADS": 3, "KV_HEADS": 1, "HEAD_DIM": 2, "INNER": "F16"}


def layout_of(
    head_dim: int, itemsize: int, kilobytes: int, heads: int = 32, kv_heads: int = 8
) -> dict[str, int]:
    """Return the constants of attention.cu for a chip with so much shared memory."""
    spec = specs.Attention(2048, heads, kv_heads, head_dim, 1e6, 1e-5)
    return parts.layout(spec, itemsize, kilobytes * 1024)._asdict()


# Each source with the constants of LFM2-8B-A1B, and with odd ones where they change the code.
KERNELS: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("packing", {}, ALL),
    ("ceilings", {}, ALL),
    ("ceilings16", HALVES["fp16"], ALL),
    ("ceilings16", HALVES["bf16"], FROM_SM_80),
    ("ceilings90", HALVES["bf16"], ("sm_90a",)),
    ("ceilings90", HALVES["fp16"], ("sm_90a",)),
    ("after_copies", {}, ALL),
    ("sums", {"VECTOR": 4}, ALL),
    ("sums", {"VECTOR": 1}, ALL),
    ("channel", {}, ALL),
    ("picking", {"VECTOR": 4}, ALL),
    ("picking", {"VECTOR": 1}, ALL),
    ("sampling", {"CTAS": 8}, ("sm_90a", "sm_100")),
    ("sampling", {"CTAS": 1}, ("sm_75", "sm_80")),
    ("exchange", {"VECTOR": 4, "TAKEN": 4, "ROW": "F32"}, ALL),
    ("exchange", {"VECTOR": 4, "TAKEN": 4, "ROW": "BF16"}, ALL),
    ("exchange", {"VECTOR": 4, "TAKEN": 4, "ROW": "F16"}, ALL),
    ("exchange", {"VECTOR": 1, "TAKEN": 3, "ROW": "BF16"}, ALL),
    ("peers", {}, ALL),
    ("gemm", {"TILE_K": 4, "PASS": 2}, ("sm_75",)),
    ("gemm", {"TILE_K": 8, "PASS": 2}, ("sm_80",)),
    ("gemm", {"TILE_K": 16, "PASS": 4}, ("sm_90a", "sm_100")),
    ("few_rows", {"ROWS": 1, "TEAM": 1, "STAGES": 6, "VECTOR": 4}, ALL),
    ("few_rows", {"ROWS": 8, "TEAM": 1, "STAGES": 3, "VECTOR": 1}, ALL),
    ("few_rows", {"ROWS": 16, "TEAM": 2, "STAGES": 1, "VECTOR": 4}, ALL),
    ("panels", {}, ALL),
    ("activations", {}, ALL),
    ("gemm16", {**HALVES["fp16"], "SHARED_BYTES": 64 * 1024}, ALL),
    ("gemm16", {**HALVES["bf16"], "SHARED_BYTES": 96 * 1024}, FROM_SM_80),
    ("few_rows90", HALVES["bf16"], ("sm_90a",)),
    ("few_rows90", HALVES["fp16"], ("sm_90a",)),
    ("gemm90", {**HALVES["bf16"], "TERMS": 1, **LOW}, ("sm_90a",)),
    ("gemm90", {**HALVES["bf16"], "TERMS": 3, **LOW}, ("sm_90a",)),
    ("gemm90", {**HALVES["bf16"], "TERMS": 1}, ("sm_90a",)),
    ("gemm90", {**HALVES["fp16"], "TERMS": 1}, ("sm_90a",)),
    ("gemm90", {**HALVES["bf16"], "TERMS": 3}, ("sm_90a",)),
    ("blocks/rows", {"HIDDEN": 2048, "VECTOR": 4, "OUT": "BF16"}, ALL),
    ("blocks/rows", {"HIDDEN": 13, "VECTOR": 1, "OUT": "F32"}, ALL),
    ("blocks/short_conv", {**CONV, "ROWS": 4, "INNER": "F32"}, ALL),
    ("blocks/short_conv", {**CONV, "ROWS": 1, "INNER": "BF16"}, ALL),
    ("blocks/short_conv", {**CONV, "ROWS": 4, "INNER": "F16", "VECTOR": 1}, ALL),
    ("blocks/short_conv", {**CONV, "KERNEL_SIZE": 1, "WINDOW": 16, "ROWS": 4, "INNER": "F32"}, ALL),
    ("blocks/rotation", {**HEADS, "INNER": "F32"}, ALL),
    ("blocks/rotation", ODD_HEADS, ALL),
    ("blocks/attention", {**HEADS, "INNER": "F32", **layout_of(64, 4, 227)}, ("sm_90a", "sm_100")),
    ("blocks/attention", {**HEADS, "INNER": "F32", **layout_of(64, 4, 64)}, ("sm_75",)),
    ("blocks/attention", {**HEADS, "INNER": "BF16", **layout_of(64, 2, 227)}, ("sm_90a", "sm_100")),
    ("blocks/attention", {**HEADS, "INNER": "BF16", **layout_of(64, 2, 163)}, ("sm_80",)),
    ("blocks/attention", {**ODD_HEADS, **layout_of(2, 2, 64, heads=3, kv_heads=1)}, ALL),
    ("blocks/router", {"HIDDEN": 2048, "VECTOR": 4, "EXPERTS": 32, "TAKEN": 1}, ALL),
    ("blocks/router", {"HIDDEN": 4, "VECTOR": 4, "EXPERTS": 32, "TAKEN": 4}, ALL),
    ("blocks/router", {"HIDDEN": 13, "VECTOR": 1, "EXPERTS": 33, "TAKEN": 8}, ALL),
    ("blocks/grouping", {"EXPERTS": 32, "TAKEN": 4}, ALL),
    ("blocks/grouping", {"EXPERTS": 256, "TAKEN": 8}, ALL),
    ("blocks/experts", {"VECTOR": 4, "TAKEN": 4}, ALL),
    ("blocks/experts", {"VECTOR": 1, "TAKEN": 1}, ALL),
]


def is_always_optimised(stem: str, constants: dict[str, Any], architecture: str) -> bool:
    """Return whether a source is compiled as for users each time, and not by --long alone.

    Hopper stands for all chips, and gemm90's low tiles stand for the products in 16 bits, which
    take up to a minute.
    """
    if stem == "gemm90":
        return "MOST_ROWS" in constants
    return architecture == "sm_90a" and stem != "gemm16"


def is_compiled_plainly(stem: str, constants: dict[str, Any], architecture: str) -> bool:
    """Return whether a source is compiled without the optimiser."""
    if stem == "gemm16":
        return architecture in PLAINLY[constants["HALF"]]
    return architecture != "sm_90a"


ALL_CASES = [
    (f"{stem}-{i}-{arch}", (stem, constants, arch))
    for i, (stem, constants, architectures) in enumerate(KERNELS)
    for arch in architectures
]
CASES = [
    pytest.param(*case, id=name, marks=() if is_always_optimised(*case) else pytest.mark.long)
    for name, case in ALL_CASES
]
# Turing stands for the chips before Hopper, whose instructions it does not have either.
PLAIN_CASES = [
    pytest.param(*case, id=name, marks=() if case[2] == "sm_75" else pytest.mark.long)
    for name, case in ALL_CASES
    if is_compiled_plainly(*case)
]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return the folder of a cache that holds nothing from before."""
    monkeypatch.setenv("LFM2KIT_CACHE_DIR", str(tmp_path))
    new_process(monkeypatch)
    return tmp_path / "cuda"


def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what is known of the cache, and what was said."""
    monkeypatch.setattr(compiling, "KERNELS", KernelCache("cuda"))
    compiling._announce.cache_clear()


class Made(NamedTuple):
    """What the compiler says of machine code: the PTX of which it is made, and its remarks."""

    ptx: str
    log: str


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Made]:
    """Return a list that gets what the compiler says of all machine code."""
    all_made, output = [], nvrtc._output

    def kept(program: Any, what: str) -> bytes:
        if what == "CUBIN":
            all_made.append(Made(*(output(program, w).decode() for w in ("PTX", "ProgramLog"))))
        return output(program, what)

    monkeypatch.setattr(nvrtc, "_output", kept)
    return all_made


@pytest.fixture(scope="module")
def compiled_before() -> KernelCache:
    """Return where the PTX of what compiles is kept from run to run, beside users' kernels."""
    cache = KernelCache("cuda-tests")
    cache.write("opened", b"")  # now, and not in the folder of a test
    return cache


@pytest.mark.parametrize(("stem", "constants", "architecture"), CASES)
def test_kernels_compile_and_wait_for_the_one_before_if_they_are_launched_early(
    stem: str,
    constants: dict[str, Any],
    architecture: str,
    compiled_before: KernelCache,
    made: list[Made],
) -> None:
    """On Hopper, as dependent.cuh promises.  What has compiled once is not compiled again.

    Matrix instructions that the compiler makes wait for each other take several times as long.
    """
    name = f"{Path(stem).name}-{compiling._key(stem, architecture, constants)}"
    ptx = compiled_before.read(name)
    if ptx is None:
        assert compile_source(stem, architecture, constants).startswith(b"\x7fELF")
        assert "serialized" not in made[0].log
        compiled_before.write(name, ptx := made[0].ptx.encode())
    if waits_for_previous(stem) and architecture == "sm_90a":
        kernels = kernels_in(ptx.decode())
        assert kernels
        for kernel, body in kernels.items():
            assert body.count(WAIT) >= WAYS.get(stem, 1), kernel
            if LET_NEXT_START in body:
                last_wait = body.index(WAIT) if stem in PARTED else body.rindex(WAIT)
                assert last_wait < body.index(LET_NEXT_START), kernel


@pytest.mark.parametrize(("stem", "constants", "architecture"), PLAIN_CASES)
def test_each_chip_has_the_instructions_that_kernels_use(
    stem: str,
    constants: dict[str, Any],
    architecture: str,
    compiled_before: KernelCache,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without the optimiser, which takes most of the time: each chip's own code becomes its own."""
    monkeypatch.setattr(compiling, "OPTIONS", ("--device-debug", *compiling.OPTIONS))
    name = f"{Path(stem).name}-{compiling._key(stem, architecture, constants)}"
    if compiled_before.read(name) is None:
        assert compile_source(stem, architecture, constants).startswith(b"\x7fELF")
        compiled_before.write(name, b"it compiles")


def kernels_in(text: str) -> dict[str, str]:
    """Return the body of each kernel by name."""
    parts = re.split(r"\.entry (\w+)\(", text)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_the_registers_hold_the_sum_of_any_number_of_experts(made: list[Made]) -> None:
    """A launch fails if its threads want more registers than there are: a bound makes them fit."""
    compile_source("blocks/experts", "sm_90a", {"VECTOR": 1, "TAKEN": 33})
    kernels = kernels_in(made[0].ptx)
    for kernel in ("combine_F32", "combine_BF16"):
        assert f".maxntid {EXPERTS.COMBINE_THREADS}" in kernels[kernel]


def test_older_chips_have_nothing_to_wait_with(made: list[Made]) -> None:
    (stem, constants, _), *_ = (case for case in KERNELS if waits_for_previous(case[0]))
    compile_source(stem, "sm_80", constants)
    assert "griddepcontrol" not in made[0].ptx


def test_a_source_that_does_not_promise_is_not_launched_early() -> None:
    assert not waits_for_previous("packing")


def test_every_source_is_compiled_here() -> None:
    sources = {str(p.relative_to(SOURCES).with_suffix("")) for p in SOURCES.rglob("*.cu")}
    assert sources == {stem for stem, _, _ in KERNELS}


def test_what_was_compiled_is_kept_and_read_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    new = compile_source("packing", "sm_80", {})
    compile_source("packing", "sm_90a", {})
    assert capsys.readouterr().err.startswith("cuda: compiling kernels for sm_80 ...\n")
    new_process(monkeypatch)
    monkeypatch.setattr(nvrtc, "compile_cubin", None)  # calling it would fail
    assert compile_source("packing", "sm_80", {}) == new
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kept_bytes", [0, 20, -1])
def test_a_cut_file_is_compiled_again_and_never_loaded(
    kept_bytes: int,
    own_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    new = compile_source("packing", "sm_80", {})
    (file,) = own_cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:kept_bytes])
    new_process(monkeypatch)
    assert compile_source("packing", "sm_80", {}) == new
    assert f"cuda: '{file}' cannot be used (it is damaged)" in capsys.readouterr().err
    assert file.read_bytes() == whole


def test_in_a_folder_that_is_not_to_be_used_kernels_are_compiled_for_the_run(
    own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own_cache.mkdir()
    own_cache.chmod(0o777)
    assert compile_source("packing", "sm_80", {}).startswith(b"\x7fELF")
    not_used, compiling_line = capsys.readouterr().err.splitlines()
    assert "kernels are compiled for this run only" in not_used
    assert compiling_line == "cuda: compiling kernels for sm_80 ..."
    assert list(own_cache.iterdir()) == []


def test_other_constants_or_another_architecture_are_another_kernel(own_cache: Path) -> None:
    for vector in (1, 4):
        compile_source("blocks/rows", "sm_80", {"HIDDEN": 8, "VECTOR": vector, "OUT": "F32"})
    compile_source("blocks/rows", "sm_90a", {"HIDDEN": 8, "VECTOR": 4, "OUT": "F32"})
    assert len(list(own_cache.iterdir())) == 3


def test_a_changed_header_is_another_kernel(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_source("packing", "sm_80", {})
    monkeypatch.setattr(compiling, "_headers", lambda: b"changed")
    compile_source("packing", "sm_80", {})
    assert len(list(own_cache.iterdir())) == 2


def test_an_error_in_a_source_is_told_with_its_line() -> None:
    with pytest.raises(nvrtc.CompileError, match=r"wrong\.cu\(2\): error"):
        nvrtc.compile_cubin("\nint x = y;", "wrong.cu", ["--gpu-architecture=sm_80"])


def test_a_gpu_that_the_compiler_does_not_know_is_told_in_a_line() -> None:
    with pytest.raises(
        Lfm2kitError, match=r"gpu-architecture.*pip install -U nvidia-cuda-nvrtc"
    ) as error:
        nvrtc.compile_cubin("", "new.cu", ["--gpu-architecture=sm_999"])
    assert "\n" not in str(error.value)


def test_hopper_is_compiled_for_with_its_own_instructions() -> None:
    assert architecture_name(9, 0) == "sm_90a"
    assert architecture_name(7, 5) == "sm_75"
    assert architecture_name(10, 0) == "sm_100"


def test_a_compilation_is_a_step_that_may_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = progress.Progress()
    told: list[tuple[str, float]] = []
    mine.on_step = lambda: told.append((mine.now.name, mine.now.seconds))
    monkeypatch.setattr(progress, "THIS_PROCESS", mine)
    nvrtc.compile_cubin("__global__ void nothing() {}", "nothing.cu", ("-arch=sm_90",))
    assert told == [
        ("compiling nothing.cu", progress.COMPILING), ("compiled nothing.cu", progress.DEADLINE)
    ]  # fmt: skip
