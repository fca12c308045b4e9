"""Packages are fetched by a command, checked, and taken apart."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

from lfm2kit.errors import Lfm2kitError
from tests.training.archives import ar_of, tar_of
from training.packages import Package, deb_files, package_bytes, tar_files

CONTENT = b"a package"


def package(*python: str) -> Package:
    """Return a package whose command runs some Python."""
    hashed = hashlib.sha256(CONTENT).hexdigest()
    return Package("some.tgz", hashed, (sys.executable, "-c", "; ".join(python)))


def test_a_missing_package_is_fetched_once(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    fetched = package(f"open('some.tgz', 'xb').write({CONTENT!r})")  # x: fails the second time
    assert package_bytes(fetched, folder) == CONTENT
    assert package_bytes(fetched, folder) == CONTENT


def test_another_hash_is_refused(tmp_path: Path) -> None:
    (tmp_path / "some.tgz").write_bytes(b"another package")
    with pytest.raises(Lfm2kitError, match=r"some\.tgz: its SHA-256 is [0-9a-f]{64}, expected"):
        package_bytes(package(), tmp_path)


def test_a_package_that_cannot_be_fetched_says_what_to_do(tmp_path: Path) -> None:
    failing = package("import sys", "sys.exit('no such version')")
    with pytest.raises(
        Lfm2kitError, match=r"did not fetch some\.tgz \(no such version\); put this"
    ):
        package_bytes(failing, tmp_path)
    unknown = Package("some.tgz", "", ("no-such-client", "get"))
    with pytest.raises(Lfm2kitError, match="`no-such-client get` did not fetch"):
        package_bytes(unknown, tmp_path)


def test_tar_files_are_those_below_a_prefix() -> None:
    archive = tar_of({"./a/b/one": b"1", "./a/two": b"2", "a/b/c/three": b"3"}, "w:gz")
    assert tar_files(archive, "a/b/") == {"one": b"1", "c/three": b"3"}


def test_the_data_of_a_debian_package_is_found_after_members_of_odd_length() -> None:
    data = tar_of({"./usr/share/x": b"text"})
    deb = ar_of({"debian-binary": b"2.0", "control.tar.xz": tar_of({}), "data.tar.xz": data})
    assert deb_files(deb, "usr/share/") == {"x": b"text"}


@pytest.mark.parametrize("bad", [b"", b"\x1f\x8b gzip", ar_of({"debian-binary": b"2.0\n"})])
def test_another_file_is_not_a_debian_package(bad: bytes) -> None:
    with pytest.raises(Lfm2kitError, match="not a Debian package"):
        deb_files(bad, "")
