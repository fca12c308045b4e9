"""Recognises files that are not what a reader expects, by their kind and their first bytes.

Every reader calls this before it opens a file: a pipe would block, a device never ends, and a
server's error page should not be called a damaged model.
"""

from __future__ import annotations

import os
import re
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

from lfm2kit import bounds
from lfm2kit.errors import Lfm2kitError

MOST_LINKS = 40  # in a row: Linux does not follow more
# Files in /proc claim no bytes, and some block whoever reads them: nothing opens such a file.
EMPTY = "the file is empty, or has no size, as those in /proc; give another file"
HEAD = 512  # bytes that show what a file is: the sign of a tar archive ends at byte 262

SPECIAL: dict[Callable[[int], bool], str] = {
    stat.S_ISDIR: "this is a directory; give a file",
    stat.S_ISFIFO: "this is a pipe, and lfm2kit needs a regular file; write the data to one "
    "and give that",
    stat.S_ISCHR: "this is a device or a terminal; give a file",
    stat.S_ISBLK: "this is a device; give a file",
    stat.S_ISSOCK: "this is a socket; give a file",
}

UNPACK = "unpack it and give the folder that comes out"
NO_PICKLES = (
    "which lfm2kit does not read, because unpickling runs code: load it with transformers, "
    "save_pretrained('NEW_FOLDER'), and give that folder"
)

# The first bytes of files in other formats, and what to say about them.
SIGNS: dict[bytes, str] = {
    b"GGUF": "this is a GGUF file (llama.cpp's), which lfm2kit reads with the plugin lfm2kit-gguf; "
    "install that, or give the Hugging Face folder that the file was made from",
    b"GGML": "this is a GGML file, which lfm2kit does not read; give a Hugging Face folder",
    b"version https://git-lfs": "this is a Git LFS pointer, not the file; "
    "type 'git lfs pull' in its repository",
    b"\x89HDF": "this is an HDF5 file, which lfm2kit does not read; give a safetensors folder",
    b"\x93NUMPY": "this is a NumPy array (.npy), not a model; give a safetensors folder",
    b"\x80\x02": f"this is a pickle (PyTorch's), {NO_PICKLES}",
    b"\x80\x03": f"this is a pickle, {NO_PICKLES}",
    b"\x80\x04": f"this is a pickle, {NO_PICKLES}",
    b"\x80\x05": f"this is a pickle, {NO_PICKLES}",
    b"\x1f\x8b\x08": f"this is a gzip archive; {UNPACK}",
    b"BZh": f"this is a bzip2 archive; {UNPACK}",
    b"\xfd7zXZ": f"this is an xz archive; {UNPACK}",
    b"\x28\xb5\x2f\xfd": f"this is a Zstandard archive; {UNPACK}",
    b"7z\xbc\xaf\x27\x1c": f"this is a 7z archive; {UNPACK}",
    b"Rar!": f"this is a RAR archive; {UNPACK}",
}

DOWNLOAD_AGAIN = "a failed download; download the file again"

# What servers send instead of a file, in lower case.
ANSWERS: dict[bytes, str] = {
    b"<!doctype html": f"this is a web page ({DOWNLOAD_AGAIN})",
    b"<html": f"this is a web page ({DOWNLOAD_AGAIN})",
    b"<?xml": f"this is XML ({DOWNLOAD_AGAIN})",
    b"entry not found": f"this is a server's answer ({DOWNLOAD_AGAIN})",
    b"repository not found": f"this is a server's answer ({DOWNLOAD_AGAIN})",
    b"invalid username or password": f"this is a server's answer ({DOWNLOAD_AGAIN}, logged in)",
    b"access to model": f"this is a server's answer ({DOWNLOAD_AGAIN}, once access is granted)",
}


def check_file(path: Path, *, is_text: bool = False) -> int:
    """Return the size in bytes of a regular file that may hold weights or, with `is_text`, text.

    Raise `Lfm2kitError` for a pipe, a device, a folder, a broken link, an empty file, and a file
    whose first bytes belong to another format.  Opens nothing but regular files that have a size.
    """
    try:
        if not (size := check_regular(path)):
            raise Lfm2kitError(f"{path}: {EMPTY}")
        with open(path, "rb") as file:
            head = file.read(HEAD)
    except (OSError, ValueError) as error:
        raise Lfm2kitError(f"{path}: {_why_not(path, error)}") from None
    if (kind := foreign(head, "" if is_text else path.suffix)) is not None:
        raise Lfm2kitError(f"{path}: {kind}")
    return size


def check_regular(path: Path) -> int:
    """Return the size in bytes of a regular file, without opening it.

    Raise `Lfm2kitError` for a pipe, a device, a folder, and a path that does not exist.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise Lfm2kitError(f"{path}: {_why_not(path, error)}") from None
    for is_so, sentence in SPECIAL.items():
        if is_so(status.st_mode):
            raise Lfm2kitError(f"{path}: {sentence}")
    return status.st_size


def foreign(head: bytes, suffix: str = "") -> str | None:
    """Return a sentence that says what a file with these first bytes is; None if it is unknown.

    Two formats that lfm2kit reads begin with a number, which may look like another format's sign.
    They are checked first: a safetensors file has "{" as its ninth byte, and model.bin begins with
    the number of its tensors, which is below 2^18.
    """
    if head[8:9] == b"{" or (head[2:3] < b"\4" and head[3:4] == b"\0"):
        return None
    for sign, sentence in SIGNS.items():
        if head.startswith(sign):
            return sentence
    if head.startswith(b"PK\x03\x04"):
        return _zip(head)
    if head[257:262] == b"ustar":
        return f"this is a tar archive; {UNPACK}"
    if suffix in (".onnx", ".tflite", ".msgpack", ".ckpt", ".h5", ".pt", ".pth"):
        return f"a {suffix} file is not read by lfm2kit; give a safetensors folder"
    text = head.lstrip().lower()
    if suffix in (".safetensors", ".bin") and text.startswith(b"{"):
        return f"this is JSON text ({DOWNLOAD_AGAIN})"
    return next((sentence for sign, sentence in ANSWERS.items() if text.startswith(sign)), None)


def is_safetensors(path: Path) -> bool:
    """Return whether a file begins like a safetensors file: a small length, then a JSON object."""
    with open(path, "rb") as file:
        head = file.read(9)
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= bounds.HEADER


def broken_link(path: Path) -> str | None:
    """Return a sentence about a broken link; None for anything else."""
    if not os.path.islink(path) or os.path.exists(path):
        return None
    return (
        f"this is a link to {os.readlink(path)}, which does not exist; download it again, "
        "or copy folders of links with 'cp -rL'"
    )


def _zip(head: bytes) -> str:
    """Return a sentence about a zip archive, which it identifies by its first member's name."""
    length = struct.unpack_from("<H", head.ljust(30, b"\0"), 26)[0]
    member = head[30 : 30 + length]
    if member.endswith(b".npy"):
        return "this is NumPy's .npz, not a model; give a safetensors folder"
    if member.endswith((b"/data.pkl", b"/version", b"/byteorder")) or not member:
        return f"this is a zip of pickles (PyTorch's), {NO_PICKLES}"
    return f"this is a zip archive; {UNPACK}"


def _why_not(path: Path, error: OSError | ValueError) -> str:
    reason = getattr(error, "strerror", None) or str(error)
    return broken_link(path) or reason


def is_of_this_process(path: Path) -> bool:
    """Return whether `path` leads to a file that this process has open.

    Examples are /dev/stdin, /dev/fd/3 and /proc/self/fd/3, links to them, and paths below them.  In
    another process the same path may lead to another file, or to none.
    """
    own = re.compile(rf"/dev/fd|/proc/{os.getpid()}(/task/\d+)?/fd")
    return any(own.fullmatch(folder) for part in (path, *path.parents) for folder in _folders(part))


def _folders(path: Path) -> Iterator[str]:
    """Yield the folder that contains `path`, and those of the links that it leads through."""
    for _ in range(MOST_LINKS):
        folder = os.path.realpath(path.parent)
        yield folder
        try:
            path = Path(folder, os.readlink(Path(folder, path.name)))
        except OSError:  # it is not a link
            return
