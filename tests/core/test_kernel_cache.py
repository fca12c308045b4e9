"""What is kept comes back whole or not at all, and from nobody whom one need not trust."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lfm2kit import kernel_cache, progress
from lfm2kit.kernel_cache import TURN_SECONDS, KernelCache

CODE = bytes(range(256)) * 4


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return the only place that the environment names."""
    monkeypatch.delenv("LFM2KIT_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def kept() -> Path:
    """Return the file of a kernel "tile" that was just kept."""
    KernelCache("fast").write("tile", CODE)
    folder = KernelCache("fast").folder
    assert folder is not None
    return folder / "tile.kernel"


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


def test_what_is_kept_comes_back_in_another_process_and_to_nobody_else() -> None:
    file = kept()
    assert KernelCache("fast").read("tile") == CODE
    assert KernelCache("fast").read("other") is None
    assert KernelCache("other").read("tile") is None
    assert [mode(file), mode(file.parent), mode(file.parent.parent)] == [0o600, 0o700, 0o700]


def test_the_folder_is_the_named_one_or_else_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of-all")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert KernelCache("fast").folder == Path("/cache/lfm2kit/fast")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which its specification says to ignore
    assert KernelCache("fast").folder == Path("/home/of-all/.cache/lfm2kit/fast")
    monkeypatch.setenv("LFM2KIT_CACHE_DIR", "/opt/kernels")
    assert KernelCache("fast").folder == Path("/opt/kernels/fast")
    monkeypatch.setenv("LFM2KIT_CACHE_DIR", "~/kernels")
    assert KernelCache("fast").folder == Path("/home/of-all/kernels/fast")


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "emptied": lambda stored: b"",
    "cut": lambda stored: stored[:-1],
    "cut in its checksum": lambda stored: stored[:20],
    "longer": lambda stored: stored + b"\0",
    "garbage": lambda stored: b"\xff" * len(stored),
    "without a checksum": lambda stored: CODE,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_thrown_away_with_one_line(
    damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = kept()
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    cache = KernelCache("fast")
    assert cache.read("tile") is None
    assert not file.exists()
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"fast: '{file}' cannot be used (it is damaged)")
    cache.write("tile", CODE)
    assert KernelCache("fast").read("tile") == CODE


def test_no_single_bit_that_flips_passes() -> None:
    file = kept()
    stored = file.read_bytes()
    for bit in range(8 * len(stored)):
        flipped = bytearray(stored)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        assert KernelCache("fast").read("tile") is None, bit


def test_a_file_under_another_name_is_another_kernel() -> None:
    file = kept()
    file.rename(file.with_name("other.kernel"))
    assert KernelCache("fast").read("other") is None


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    file = kept()
    elsewhere = file.rename(tmp_path / "elsewhere")
    file.symlink_to(elsewhere)
    assert KernelCache("fast").read("tile") is None
    os.mkfifo(file)
    assert KernelCache("fast").read("tile") is None  # and nobody waits for a writer


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line about a cache that is neither read nor written."""
    cache = KernelCache("fast")
    assert cache.read("tile") is None
    cache.write("other", CODE)
    assert cache.read("other") is None
    assert not cache.keeps
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "compiled for this run only; LFM2KIT_CACHE_DIR can name another folder" in said
    return said


@pytest.mark.parametrize("bits", [0o777, 0o770, 0o722])
@pytest.mark.parametrize("level", [0, 1])
def test_a_folder_that_others_may_write_is_left_alone(
    bits: int, level: int, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = kept().parents[level]
    folder.chmod(bits)
    assert f"'{folder}' can be written by others (mode {bits:04o})" in refused(capsys)


def test_a_folder_above_with_a_sticky_bit_will_do() -> None:
    kept().parent.parent.chmod(0o1777)  # as /tmp: nobody can rename what is another's
    assert KernelCache("fast").read("tile") == CODE


def test_a_folder_of_another_user_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    owner = kept().stat().st_uid
    monkeypatch.setattr("os.geteuid", lambda: owner + 1)
    monkeypatch.setattr(kernel_cache, "_trusted_by_all", lambda: {owner + 2})
    assert f"belongs to user {owner}" in refused(capsys)


def test_a_file_that_others_may_write_is_not_read() -> None:
    kept().chmod(0o606)
    assert KernelCache("fast").read("tile") is None


def test_a_link_in_the_folders_place_is_not_followed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = kept().parent
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    assert f"'{folder}' cannot be opened" in refused(capsys)


def test_the_cache_that_an_administrator_made_is_read_by_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LFM2KIT_CACHE_DIR", str(tmp_path / "shared"))
    mask = os.umask(0o077)
    try:
        file = kept()
    finally:
        os.umask(mask)
    assert [mode(file), mode(file.parent), mode(file.parent.parent)] == [0o644, 0o755, 0o755]
    owner = file.stat().st_uid
    monkeypatch.setattr("os.geteuid", lambda: owner + 1)
    monkeypatch.setattr(kernel_cache, "_trusted_by_all", lambda: {owner})
    assert KernelCache("fast").read("tile") == CODE
    assert capsys.readouterr().err == ""


def test_a_named_folder_of_anybody_else_stays_private(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LFM2KIT_CACHE_DIR", str(tmp_path / "mine"))
    monkeypatch.setattr(kernel_cache, "_trusted_by_all", lambda: {os.geteuid() + 1})
    file = kept()
    assert [mode(file), mode(file.parent)] == [0o600, 0o700]


def test_without_a_home_nothing_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert "there is no home folder" in refused(capsys)
    monkeypatch.setattr(Path, "home", lambda: Path(""))  # HOME is empty
    assert "there is no home folder" in refused(capsys)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_what_cannot_be_written_is_said_once_and_leaves_nothing(
    error: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = kept()

    def fails(*arguments: object, **keywords: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr("os.replace", fails)
    cache = KernelCache("fast")
    cache.write("second", CODE)
    cache.write("third", CODE)
    assert not cache.keeps
    assert [path.name for path in file.parent.iterdir()] == ["tile.kernel"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"'{file.parent}' cannot be written ({os.strerror(error)})" in said
    assert cache.read("tile") == CODE


def test_a_home_that_is_no_folder_is_said(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "file"))
    assert "cannot be opened (Not a directory)" in refused(capsys)


def test_an_interrupt_while_writing_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = kept()
    monkeypatch.setattr("os.fchmod", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        KernelCache("fast").write("second", CODE)
    assert [path.name for path in file.parent.iterdir()] == ["tile.kernel"]


def test_what_nobody_used_for_months_goes_when_something_new_comes() -> None:
    file = kept()
    old, abandoned, foreign = (
        file.with_name(name) for name in ("old.kernel", ".new.1.partial", "notes.txt")
    )
    for path, days in [(file, 89), (old, 91), (abandoned, 2), (foreign, 1000)]:
        path.touch()
        os.utime(path, times=(time.time() - days * 86400,) * 2)
    KernelCache("fast").write("second", CODE)
    assert {path.name for path in file.parent.iterdir()} == {
        "second.kernel", "tile.kernel", "notes.txt",
    }  # fmt: skip


def test_who_waits_for_a_turn_goes_on_as_soon_as_the_kernel_is_there() -> None:
    first, second, found = KernelCache("fast"), KernelCache("fast"), []

    def look() -> None:
        with second.turn("tile"):
            found.append(second.read("tile"))

    thread = threading.Thread(target=look)
    with first.turn("tile"):
        thread.start()
        thread.join(0.1)
        assert found == []
        first.write("tile", CODE)
        thread.join(TURN_SECONDS / 2)  # the first goes on to compile other kernels
        assert found == [CODE]


def test_a_turn_for_a_missing_kernel_is_a_step_that_may_take_as_long_as_compiling(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else a watched rank that waits for one kernel after the other would seem to hang."""
    mine = progress.Progress()
    told: list[tuple[str, float]] = []
    mine.on_step = lambda: told.append((mine.now.name, mine.now.seconds))
    monkeypatch.setattr(progress, "THIS_PROCESS", mine)
    cache = KernelCache("fast")
    with cache.turn("tile"):
        cache.write("tile", b"code")
    with cache.turn("tile"):
        pass
    assert told == [
        ("waiting for kernel tile", progress.COMPILING),
        ("kernel tile is ready", progress.DEADLINE),
    ]


def test_the_time_of_all_turns_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("lfm2kit.kernel_cache.time.monotonic", lambda: now[0])
    monkeypatch.setattr(KernelCache, "seconds", 1.0)
    for seconds in (2.0, 3.0):  # missing at first, then kept
        with KernelCache("fast").turn("tile"):
            now[0] += seconds
    assert KernelCache.seconds == 6.0


def test_whose_turn_ends_without_a_kernel_gives_it_to_the_next() -> None:
    first, second, found = KernelCache("fast"), KernelCache("fast"), []

    def look() -> None:
        with second.turn("tile"):
            found.append(second.read("tile"))

    thread = threading.Thread(target=look)
    with first.turn("tile"):  # interrupted, say
        thread.start()
    thread.join(TURN_SECONDS / 2)
    assert found == [None]


def test_a_turn_that_never_comes_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_cache, "TURN_SECONDS", 0.05)
    with KernelCache("fast").turn("tile"), KernelCache("fast").turn("tile"):
        pass


def test_a_closed_stderr_is_no_reason_to_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept().parent.chmod(0o777)
    with open(os.devnull, "w") as closed:
        pass
    for stream in (closed, None):
        monkeypatch.setattr("sys.stderr", stream)
        assert KernelCache("fast").read("tile") is None
    assert capsys.readouterr().out == ""
