"""Sample files: what goes out comes back, what lies is refused, what is wrong is INVALID."""

from __future__ import annotations

import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.extra.numpy import array_shapes, arrays

from lfm2kit.building.loading import EMBEDDED
from lfm2kit.errors import Lfm2kitError
from lfm2kit.measuring import samples
from lfm2kit.measuring.samples import (
    BadAnswersError,
    read_answers,
    read_inputs,
    write_inputs,
    write_outputs,
)
from tests.checkpoint.folders import Tensors, change_tensors, ones
from tests.checkpoint.typed import Cli, Typed

Ids = npt.NDArray[np.int32]
Logits = npt.NDArray[np.float32]

in_one_folder = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=80
)
shapes = array_shapes(min_dims=2, max_dims=2, max_side=5)


# ---- the files ----


@in_one_folder
@given(token_ids=arrays(np.int32, shapes))
def test_token_ids_come_back(tmp_path: Path, token_ids: Ids) -> None:
    write_inputs(tmp_path / "inputs.bin", token_ids)
    np.testing.assert_array_equal(read_inputs(tmp_path / "inputs.bin"), token_ids)


@in_one_folder
@given(bits=arrays(np.uint32, shapes))
def test_logits_come_back_bit_for_bit(tmp_path: Path, bits: npt.NDArray[np.uint32]) -> None:
    """NaNs and infinities too: the validator must get to see them."""
    write_outputs(tmp_path / "outputs.bin", bits.view(np.float32))
    assert read_answers(tmp_path / "outputs.bin").tobytes() == bits.tobytes()


def test_the_layout_is_the_assignments_byte_for_byte(tmp_path: Path) -> None:
    write_inputs(tmp_path / "inputs.bin", np.array([[1, 2], [3, 65535]], np.int32))
    assert (tmp_path / "inputs.bin").read_bytes() == struct.pack("<6i", 2, 2, 1, 2, 3, 65535)
    write_outputs(tmp_path / "outputs.bin", np.array([[0.5, -1, 3]], np.float32))
    assert (tmp_path / "outputs.bin").read_bytes() == struct.pack("<2i3f", 1, 3, 0.5, -1, 3)


def test_an_array_of_any_strides_is_written_in_order(tmp_path: Path) -> None:
    logits = np.arange(12, dtype=np.float32).reshape(3, 4)
    write_outputs(tmp_path / "outputs.bin", logits.T[::2])
    np.testing.assert_array_equal(read_answers(tmp_path / "outputs.bin"), logits.T[::2])


def header(*values: int, data: int = 0) -> bytes:
    return struct.pack(f"<{len(values)}i", *values) + bytes(data)


WRONG: dict[str, tuple[bytes, list[str]]] = {
    "empty": (b"", ["0 bytes"]),
    "half a header": (header(2), ["4 bytes"]),
    "a header alone": (header(2, 3), ["8 bytes", "2 samples", "take 32"]),
    "a byte short": (header(2, 3, data=23), ["31 bytes", "take 32"]),
    "a byte too many": (header(2, 3, data=25), ["33 bytes", "take 32"]),
    "a sample short": (header(2, 3, data=12), ["20 bytes", "take 32"]),
    "no samples": (header(0, 3), ["0 samples"]),
    "samples of nothing": (header(2, 0), ["2 samples"]),
    "negative": (header(-1, -2, data=8), ["-1 samples"]),
    "as many as can be": (header(2**31 - 1, 2**31 - 1, data=8), ["2147483647 samples"]),
    "bytes overflow 32 bits to 8": (header(2, 2**29 + 1, data=8), ["16 bytes", "2 samples"]),
    "big-endian": (struct.pack(">2i", 2, 3) + bytes(24), ["33554432 samples"]),
}
both = pytest.mark.parametrize(
    ("read", "error"), [(read_inputs, Lfm2kitError), (read_answers, BadAnswersError)]
)


@both
@pytest.mark.parametrize("wrong", WRONG)
def test_a_header_that_does_not_fit_its_file_is_refused_in_little_memory(
    tmp_path: Path, wrong: str, read: Callable[[Path], Any], error: type[Exception]
) -> None:
    path = tmp_path / "file.bin"
    file, words = WRONG[wrong]
    path.write_bytes(file)
    tracemalloc.start()
    with pytest.raises(error) as caught:
        read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    for word in [str(path), *words]:
        assert word in str(caught.value)
    assert peak < 1e6


@pytest.mark.parametrize("read", [read_inputs, read_answers])
def test_a_missing_file_and_a_folder_are_errors_and_no_bad_answers(
    tmp_path: Path, read: Callable[[Path], Any]
) -> None:
    for path in (tmp_path / "missing.bin", tmp_path):
        with pytest.raises(Lfm2kitError, match=path.name) as caught:
            read(path)
        assert not isinstance(caught.value, BadAnswersError)


def test_a_reader_keeps_the_file_it_opened(tmp_path: Path) -> None:
    """Outputs may take the place of answers that are being compared with."""
    path = tmp_path / "answers.bin"
    write_outputs(path, np.ones((2, 3), np.float32))
    old = read_answers(path)
    write_outputs(path, np.zeros((1, 2), np.float32))
    np.testing.assert_array_equal(old, 1)
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "outputs.bin"
    path.write_bytes(b"precious")
    with pytest.raises(ValueError, match="could not convert"):
        write_outputs(path, np.array([["no number"]]))  # type: ignore[arg-type]
    assert path.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [path]


# ---- which samples, which ids ----


@pytest.mark.parametrize("n", [1, 2, 3])
def test_any_number_of_samples_up_to_all_can_be_taken(n: int) -> None:
    token_ids = np.arange(6, dtype=np.int32).reshape(3, 2)
    np.testing.assert_array_equal(samples.take(token_ids, n), token_ids[:n])


@pytest.mark.parametrize("n", [-1, 0, 4])
def test_no_other_number_can_be_taken(n: int) -> None:
    with pytest.raises(Lfm2kitError, match=f"-n {n}.*3 samples"):
        samples.take(np.zeros((3, 2), np.int32), n)


def test_ids_within_the_vocabulary_pass() -> None:
    samples.check_ids(np.array([[0, 49]], np.int32), 50)


@pytest.mark.parametrize("bad", [-1, 50, 2**31 - 1, -(2**31)])
def test_the_first_id_outside_the_vocabulary_is_named(bad: int) -> None:
    token_ids = np.zeros((4, 3), np.int32)
    token_ids[2, 1] = token_ids[3, 0] = bad
    with pytest.raises(Lfm2kitError, match=f"sample 2, position 1: token id {bad} .* 50"):
        samples.check_ids(token_ids, 50)


# ---- on the command line ----


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of the embedded model, its inputs and answers, as the current folder."""
    folder = Path(shutil.copytree(EMBEDDED / "tiny", tmp_path / "tiny"))
    monkeypatch.chdir(folder)
    return folder


RUN = ["run", "--model", ".", "--backend", "reference", "-v", "-n"]


def assert_invalid(typed: Typed, *words: str) -> None:
    assert typed.code == 1, typed
    lines = typed.out.splitlines()
    assert "INVALID" in lines
    assert "VALID" not in lines
    for word in words:
        assert word in typed.out


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_answer_that_is_not_finite_is_invalid(tiny: Path, cli: Cli, value: float) -> None:
    answers = np.array(read_answers(tiny / "answers.bin"))
    answers[1, 5] = value
    write_outputs(tiny / "answers.bin", answers)
    assert_invalid(cli(*RUN, 2), "First mismatch at sample[1], vocab[5]")


def test_outputs_that_are_not_finite_are_invalid_and_written(tiny: Path, cli: Cli) -> None:
    """The assignment's own validator lets NaN pass."""
    name = "model.embedding_norm.weight"
    logits = read_answers(tiny / "answers.bin")[:2].size

    def spoil(tensors: Tensors) -> None:
        tensors[name] = ones(*tensors[name].shape)
        tensors[name].data[:] = np.nan

    change_tensors(tiny, spoil)
    said = f"Total mismatches: {logits}/{logits}"
    assert_invalid(cli(*RUN, 2, "--outputs", "outputs.bin"), said)
    assert np.isnan(read_answers(tiny / "outputs.bin")).all()


@pytest.mark.parametrize("wrong", WRONG)
def test_answers_that_are_none_are_invalid(tiny: Path, cli: Cli, wrong: str) -> None:
    (tiny / "answers.bin").write_bytes(WRONG[wrong][0])
    assert_invalid(cli(*RUN, 1), "answers.bin", *WRONG[wrong][1])


def test_too_few_answers_and_another_width_are_invalid(tiny: Path, cli: Cli) -> None:
    answers = np.array(read_answers(tiny / "answers.bin"))
    write_outputs(tiny / "answers.bin", answers[:2])
    assert cli(*RUN, 2).code == 0
    assert_invalid(cli(*RUN, 3), "3 samples, but only 2 answers")
    write_outputs(tiny / "answers.bin", answers[:, :-1])
    width = answers.shape[1]
    assert_invalid(cli(*RUN, 2), f"{width} logits", str(width - 1))


@pytest.mark.parametrize("wrong", WRONG)
def test_inputs_that_are_none_are_one_line(tiny: Path, cli: Cli, wrong: str) -> None:
    (tiny / "inputs.bin").write_bytes(WRONG[wrong][0])
    cli(*RUN, 1, "--outputs", "outputs.bin").assert_fails("inputs.bin", *WRONG[wrong][1])
    assert not (tiny / "outputs.bin").exists()


def test_more_samples_than_there_are_is_one_line(tiny: Path, cli: Cli) -> None:
    cli(*RUN, 129).assert_fails("-n 129", "128 samples")


@pytest.mark.parametrize("option", ["--outputs", "--json"])
@pytest.mark.parametrize("target", ["folder", "nowhere/file", "inputs.bin/file", "n" * 300])
def test_where_nothing_can_be_written_is_said_before_the_run(
    tiny: Path, cli: Cli, option: str, target: str
) -> None:
    (tiny / "folder").mkdir()
    before = sorted(tiny.iterdir())
    cli(*RUN, 1, option, target).assert_fails(option, target)
    assert sorted(tiny.iterdir()) == before


def test_outputs_in_the_place_of_wrong_answers_are_still_judged_by_those(
    tiny: Path, cli: Cli
) -> None:
    answers = np.array(read_answers(tiny / "answers.bin"))
    write_outputs(tiny / "answers.bin", answers + 1)
    assert_invalid(cli(*RUN, 2, "--outputs", "answers.bin"))
    np.testing.assert_allclose(read_answers(tiny / "answers.bin"), answers[:2], atol=1e-3)
