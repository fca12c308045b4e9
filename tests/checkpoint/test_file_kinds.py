"""What a file is by its first bytes, and that no readable file is taken for another format's."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfm2kit import bounds
from lfm2kit.checkpoint.file_kinds import SIGNS, foreign, is_of_this_process


def zipped(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return file.getvalue()


def tarred(name: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(name))
    return file.getvalue()


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"GGUF\x03\0\0\0" + bytes(99), ["GGUF", "Hugging Face folder"]),
        (b"version https://git-lfs.github.com/spec/v1\noid", ["Git LFS", "git lfs pull"]),
        (zipped("archive/data.pkl", "archive/version"), ["pickles", "save_pretrained"]),
        (b"PK\x03\x04" + bytes(99), ["pickles", "save_pretrained"]),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", ["pickle", "save_pretrained"]),
        (b"\x80\x04\x95\x10\0\0\0", ["pickle", "save_pretrained"]),
        (zipped("w.npy"), [".npz", "safetensors folder"]),
        (b"\x93NUMPY\x01\0", [".npy", "safetensors folder"]),
        (zipped("model.safetensors"), ["zip archive", "unpack"]),
        (tarred("model.safetensors"), ["tar archive", "unpack"]),
        (b"\x1f\x8b\x08\0\0\0\0\0\0\x03", ["gzip", "unpack"]),
        (b"BZh91AY&SY", ["bzip2", "unpack"]),
        (b"\xfd7zXZ\0", ["xz", "unpack"]),
        (b"\x28\xb5\x2f\xfd\x04", ["Zstandard", "unpack"]),
        (b"7z\xbc\xaf\x27\x1c", ["7z", "unpack"]),
        (b"\x89HDF\r\n\x1a\n", ["HDF5"]),
        (b"\n<!DOCTYPE HTML><html>", ["web page", "download"]),
        (b"<html><body>404", ["web page", "download"]),
        (b"<?xml version='1.0'?><Error>AccessDenied", ["XML", "download"]),
        (b"Entry not found", ["server's answer", "download"]),
        (b"Invalid username or password.", ["server's answer", "logged in"]),
        (b"Access to model x/y is restricted", ["server's answer", "access is granted"]),
    ],
)
def test_a_file_of_another_format_is_named(head: bytes, words: list[str]) -> None:
    sentence = foreign(head)
    assert sentence is not None
    for word in words:
        assert word in sentence


def test_onnx_which_has_no_sign_is_known_by_its_name() -> None:
    assert ".onnx" in (foreign(b"\x08\x07\x12\x07pytorch", ".onnx") or "")


@given(count=st.integers(0, bounds.TENSORS), rest=st.binary(max_size=20))
def test_no_model_bin_is_taken_for_another_format(count: int, rest: bytes) -> None:
    assert foreign(count.to_bytes(4, "little") + rest) is None


@given(sign=st.sampled_from(sorted(SIGNS)), rest=st.binary(max_size=20))
def test_no_safetensors_file_is_taken_for_another_format(sign: bytes, rest: bytes) -> None:
    assert foreign(sign[:8].ljust(8, b"\0") + b"{" + rest) is None


@pytest.mark.parametrize("path", ["/dev/stdin", "/dev/stdout", "/dev/fd/3", "/proc/self/fd/3"])
def test_what_a_process_has_open_is_its_own(path: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(path)
    (tmp_path / "second link").symlink_to("link")
    assert is_of_this_process(Path(path))
    assert is_of_this_process(tmp_path / "second link")
    assert is_of_this_process(Path(f"/proc/self/task/{os.getpid()}/fd/3/inputs.bin"))


def test_what_every_process_finds_under_a_name_is_not(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for path in ("/dev/null", "inputs.bin", "", "-", "/proc/self/cwd/x", tmp_path / "loop" / "x"):
        assert not is_of_this_process(Path(path)), path
