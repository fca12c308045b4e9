"""Makes small archives like those of the packages of texts."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from collections.abc import Sequence


def tar_of(files: dict[str, bytes], mode: str = "w:xz") -> bytes:
    """Return a tar archive of files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def ar_of(members: dict[str, bytes]) -> bytes:
    """Return an ar archive, whose members are padded to even lengths."""
    data = b"!<arch>\n"
    for name, content in members.items():
        data += f"{name:16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        data += content + b"\n" * (len(content) % 2)
    return data


def block(strings: Sequence[str | None], version: int = 3, kind: int = 16) -> bytes:
    """Return a block of an .rdb file; None is R's NA."""
    data = b"X\n" + struct.pack(">iii", version, 0x00040201, 0x00030500)
    if version == 3:
        data += struct.pack(">i", 5) + b"UTF-8"
    data += struct.pack(">ii", kind, len(strings))
    for string in strings:
        encoded = b"" if string is None else string.encode()
        flags, length = 0x00040009, -1 if string is None else len(encoded)
        data += struct.pack(">ii", flags, length) + encoded
    return struct.pack(">i", len(data)) + zlib.compress(data)
