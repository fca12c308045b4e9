"""docs/tutorial.md: its files are written as they stand, and its commands print what it shows."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from lfm2kit_cuda import nvrtc
from lfm2kit_cuda.requirements import why_unavailable

from tests.cuda.emulating import compiled_program, sources_in
from tests.plugins.distributions import environment, install_project
from tests.plugins.pages import (
    INSTALLING,
    ROOT,
    fences,
    files,
    headings,
    page,
    typed,
    without_index,
)

PAGE = page("tutorial.md")
_, *SECTIONS = re.split(r"^## (?=\d)", PAGE, flags=re.MULTILINE)
NUMPY, _, NUMBA, CUDA, _, PACKAGE = SECTIONS
NO_DRIVER = "there is no NVIDIA driver (libcuda.so.1)"
NUMBER = r"\d+(?:\.\d+)?(?:e[+-]?\d+)?"
ROWS = re.search(r"^ROWS = (\d+)", files(CUDA)["lfm2kit_mine/on_gpu.py"], re.MULTILINE)
assert ROWS is not None
OPTION = f"-DROWS={ROWS[1]}"  # of the compiler


class Typed(NamedTuple):
    """A command, and what the page shows of its output and of its exit code."""

    command: str
    shown: list[str]
    exit_code: int = 0


def commands(section: str) -> Iterator[Typed]:
    """Yield what a reader types; `echo $?` says with which code the command before it ends."""
    found = [one.splitlines() for text in fences(section, "console") for one in parts(text)]
    for (command, *shown), following in zip(found, [*found[1:], [""]], strict=True):
        if command != "echo $?":
            yield Typed(command, shown, int(following[1]) if following[0] == "echo $?" else 0)


def parts(text: str) -> list[str]:
    """Return each command of a fence with the lines that follow it."""
    return re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]


def is_what_it_shows(shown: Sequence[str], output: str) -> bool:
    """Return whether an output is what is shown, but for numbers, blanks and lines left out."""
    pattern = "".join(
        r"(?:.*\n)*?" if line == "..." else re.escape(plain(line)).replace(r"\.\.\.", ".*") + r"\n"
        for line in shown
    )
    text = "".join(plain(line) + "\n" for line in output.splitlines())
    return re.fullmatch(pattern, text) is not None


def plain(line: str) -> str:
    """Return a line in which all numbers, and all columns of a table, are alike."""
    return re.sub(r"[ ─━-]+", " ", re.sub(NUMBER, "0", line)).strip()


def write(folder: Path, sections: Sequence[str]) -> None:
    """Write the package as it is after these sections, and install it as `pip install -e` does."""
    for name, text in files("".join(sections)).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    for section in sections:
        amend(folder / "pyproject.toml", section)
    install_project(folder, folder / "site", folder / "built")
    shutil.rmtree(folder / "site" / "lfm2kit_mine")  # so that the folder's own is imported
    (folder / "lfm2kit").symlink_to(ROOT)  # the checkout that the page speaks of


def amend(project: Path, section: str) -> None:
    """Replace the end of pyproject.toml where a section says so."""
    for text in fences(section, "toml"):
        if text.startswith("dependencies"):
            project.write_text(project.read_text().partition("dependencies")[0] + text)


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a line of the page in a shell that finds this interpreter's programs."""
    variables = environment(Path(f"{folder}{os.pathsep}{folder / 'site'}"))
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    if command.startswith(INSTALLING):
        command = without_index(command)
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env={**variables, "PATH": programs},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("number", range(1, len(SECTIONS) + 1))
def test_every_command_of_a_section_prints_what_the_page_shows(number: int, tmp_path: Path) -> None:
    if number == 4 and why_unavailable() != NO_DRIVER:
        pytest.skip("the page shows this section on a machine without an NVIDIA driver")
    write(tmp_path, SECTIONS[:number])
    known = {line for line in typed("".join(SECTIONS[: number - 1])) if line.startswith(INSTALLING)}
    for command, shown, exit_code in commands(SECTIONS[number - 1]):
        if command in known:
            continue
        done = run(command, tmp_path)
        said = f"$ {command}\n{done.stdout}{done.stderr}"
        assert done.returncode == exit_code, said
        outputs = done.stdout, done.stderr
        assert not shown or any(is_what_it_shows(shown, output) for output in outputs), said


def test_what_is_left_out_and_what_is_another_number_is_no_difference() -> None:
    shown = ["| mine | 1.5 |", "...", "VALID"]
    assert is_what_it_shows(shown, "| mine   | 2e-03 |\na line\nand another\nVALID\n")
    assert not is_what_it_shows(shown, "| mine | 1.5 |\nINVALID\n")
    assert not is_what_it_shows(["VALID"], "VALID\na line\n")


def test_the_backend_in_numpy_has_less_than_60_lines() -> None:
    code = "".join(text for name, text in files(NUMPY).items() if name.endswith(".py"))
    assert f"in {code.count(chr(10))} lines of" in " ".join(PAGE.split())
    assert code.count("\n") < 60


def test_every_link_of_the_page_has_its_heading() -> None:
    for target, heading in re.findall(r"\]\(([\w.]*)#([\w-]+)\)", PAGE):
        assert heading in headings(page(target or "tutorial.md")), (target, heading)


def test_importing_what_is_announced_imports_no_compiler(tmp_path: Path) -> None:
    write(tmp_path, SECTIONS)
    code = "import sys, lfm2kit_mine.simd, lfm2kit_mine.cuda"
    done = run(f"python -c \"{code}; print({{'numba', 'cupy'}} & {{*sys.modules}})\"", tmp_path)
    assert done.stdout == "set()\n", done.stderr


@pytest.mark.skipif(nvrtc.why_unavailable() is not None, reason=str(nvrtc.why_unavailable()))
@pytest.mark.parametrize("architecture", ["sm_75", "sm_90a"])
def test_the_cuda_source_compiles(architecture: str) -> None:
    source = files(CUDA)["lfm2kit_mine/mlp.cu"]
    options = (f"--gpu-architecture={architecture}", OPTION)
    assert nvrtc.compile_cubin(source, "mlp.cu", options).startswith(b"\x7fELF")


# ---- the kernels on the CPU ----

EMULATED = r"""
#include "f32.h"

#include "mlp.cu"

constexpr int kThreads = 256;

int main(int, char** argv) {
  int rows = std::atoi(argv[1]), hidden = std::atoi(argv[2]), inner = std::atoi(argv[3]);
  auto x = read<float>(size_t(rows) * hidden);
  auto w1 = read<float>(size_t(inner) * hidden), w3 = read<float>(size_t(inner) * hidden);
  auto w2 = read<float>(size_t(hidden) * inner);
  std::vector<float> middle(size_t(rows) * inner), y(size_t(rows) * hidden);
  u32 tiles = u32(rows + ROWS - 1) / ROWS;
  auto grid = [=](int columns) { return Index{tiles, u32(columns + 7) / 8, 1}; };
  launch(grid(inner), kThreads, kThreads / 32, [] {}, [&] {
    gated(x.data(), w1.data(), w3.data(), middle.data(), rows, hidden, inner);
  });
  launch(grid(hidden), kThreads, kThreads / 32, [] {}, [&] {
    product(middle.data(), w2.data(), y.data(), rows, inner, hidden);
  });
  write(y);
}
"""
HIDDEN, INNER = 12, 37  # fewer than a warp's lanes, and more


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a program that computes the block with the page's kernels."""
    sources = sources_in(tmp_path_factory.mktemp("mlp"))
    (sources / "mlp.cu").write_text(files(CUDA)["lfm2kit_mine/mlp.cu"])
    (sources / "mlp.cpp").write_text(EMULATED)
    return compiled_program(sources, "mlp", [OPTION])


@pytest.mark.parametrize("rows", [1, 11])
def test_the_cuda_kernels_compute_the_block(rows: int, emulated: Path) -> None:
    x, w1, w3, w2 = arrays(rows)
    gate = (x @ w1.T).astype(np.float64)
    want = (gate / (1 + np.exp(-gate)) * (x @ w3.T)) @ w2.T
    got = called(emulated, x, w1, w3, w2)
    np.testing.assert_allclose(got, want, atol=2e-5)
    for row in {0, rows - 1}:
        assert np.array_equal(called(emulated, x[row : row + 1], w1, w3, w2)[0], got[row])


def arrays(rows: int) -> list[npt.NDArray[np.float32]]:
    """Return x, w1, w3 and w2."""
    rng = np.random.default_rng(0)
    shapes = (rows, HIDDEN), (INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def called(program: Path, x: Any, *matrices: Any) -> Any:
    command = [str(program), str(len(x)), str(HIDDEN), str(INNER)]
    sent = b"".join(array.tobytes() for array in (x, *matrices))
    done = subprocess.run(command, input=sent, stdout=subprocess.PIPE, check=True)
    return np.frombuffer(done.stdout, np.float32).reshape(x.shape)


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
def test_what_the_page_types_on_a_gpu_works(tmp_path: Path) -> None:
    write(tmp_path, SECTIONS)
    lines = re.findall(r"^    (lfm2kit .*mine_cuda.*)$", CUDA, re.MULTILINE)
    assert [line.split()[1] for line in lines] == ["backends", "run", "bench"]
    for command in (*lines, "lfm2kit plan --backend cuda,mlp=mine_cuda"):
        done = run(command, tmp_path)
        print(f"$ {command}\n{done.stdout}{done.stderr}")
        assert done.returncode == 0, done.stdout + done.stderr
    assert "(0 around 0 blocks, " in done.stdout  # nothing is copied between the two backends
