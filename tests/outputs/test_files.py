"""Files come whole into their place, whatever that place is, and killed runs leave nothing."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lfm2kit.errors import Lfm2kitError
from lfm2kit.outputs import disk, files, folders
from lfm2kit.outputs.files import check_target, replaced
from lfm2kit.outputs.folders import replaced_folder
from lfm2kit.outputs.leftovers import beside


def write(path: Path, content: bytes) -> list[str]:
    """Write a file, and return what was noted."""
    notes: list[str] = []
    with replaced(path, notes.append) as file:
        file.write(content)
    return notes


def write_folder(path: Path, **contents: bytes) -> list[str]:
    notes: list[str] = []
    with replaced_folder(path, notes.append) as folder:
        for name, content in contents.items():
            (folder / name).write_bytes(content)
    return notes


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# ---- replaced in one step ----


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o755])
def test_the_old_files_mode_is_kept(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(mode)
    assert write(path, b"new") == []
    assert (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) == (b"new", mode)


def test_a_new_file_has_the_mode_that_the_umask_gives(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path / "file", b"new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_content_and_name_reach_the_disk_in_that_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def logged_fsync(descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        steps.append("sync folder" if is_folder else "sync file")
        fsync(descriptor)

    def logged_replace(self: Path, target: Path) -> Path:
        steps.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(Path, "replace", logged_replace)
    write(tmp_path / "file", b"new")
    assert steps == ["sync file", "rename", "sync folder"]


def test_an_error_of_the_disk_in_the_middle_is_not_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system reports it once, to a call that is made while the file is being written."""
    failed, fsync = threading.Event(), os.fsync

    def failing_once(descriptor: int) -> None:
        if not failed.is_set():
            failed.set()
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing_once)
    monkeypatch.setattr(disk, "SYNC_SECONDS", 0.001)
    with pytest.raises(Lfm2kitError, match="Input/output error"), replaced(tmp_path / "file"):
        assert failed.wait(60)
    assert names(tmp_path) == []


def test_every_file_of_a_folder_reaches_the_disk_before_the_folder_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    rename = Path.rename
    monkeypatch.setattr(folders, "sync", lambda path: steps.append(path.name.split(".")[-1]))
    monkeypatch.setattr(
        Path, "rename", lambda self, target: (steps.append("rename"), rename(self, target))[1]
    )
    write_folder(tmp_path / "folder", a=b"1", b=b"2")
    assert sorted(steps[:3]) == ["a", "b", "partial"]
    assert steps[3] == "rename"


def test_the_modes_of_an_old_folder_and_its_files_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a").write_bytes(b"old")
    (folder / "a").chmod(0o640)
    folder.chmod(0o750)
    write_folder(folder, a=b"new")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750
    assert stat.S_IMODE((folder / "a").stat().st_mode) == 0o640


# ---- written in place ----


def test_a_file_with_hard_links_is_written_in_place_and_says_so(tmp_path: Path) -> None:
    path, other = tmp_path / "file", tmp_path / "other"
    path.write_bytes(b"old and longer")
    os.link(path, other)
    (note,) = write(path, b"new")
    assert str(path) in note
    assert "2 names (hard links)" in note
    assert other.read_bytes() == path.read_bytes() == b"new"
    assert names(tmp_path) == ["file", "other"]


def cannot_rename(self: Path, target: Path) -> Path:
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))


def test_a_file_that_cannot_be_renamed_onto_is_written_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(Path, "replace", cannot_rename)
    (note,) = write(path, b"new and longer")
    assert "Device or resource busy" in note
    assert path.read_bytes() == b"new and longer"
    assert names(tmp_path) == ["file"]


def test_a_new_file_that_cannot_be_renamed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "replace", cannot_rename)
    with pytest.raises(Lfm2kitError, match="busy"):
        write(tmp_path / "file", b"new")
    assert names(tmp_path) == []


def test_a_file_in_a_folder_that_takes_no_new_one_is_written_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As root every folder is writable, so that the refusal is played."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    refuse_creation(monkeypatch, errno.EACCES)
    check_target("--outputs", path)
    (note,) = write(path, b"new")
    assert "no new file can be made in its folder" in note
    assert path.read_bytes() == b"new"
    with pytest.raises(Lfm2kitError, match="Permission denied"):
        check_target("--outputs", tmp_path / "other")


@pytest.mark.parametrize("is_mounted", [True, False])
def test_a_file_that_can_neither_be_replaced_nor_written_is_refused_before_the_work(
    is_mounted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is mounted read-only, say; root may write any, so that this is played."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    if is_mounted:
        monkeypatch.setattr(files, "mount_points", lambda: {str(path)})
    else:
        os.link(path, tmp_path / "other")
    check_target("--outputs", path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(Lfm2kitError, match="no other file can take its place"):
        check_target("--outputs", path)


def test_a_disk_that_fails_is_an_error_and_leaves_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    write(tmp_path / "file", b"old")
    write_folder(tmp_path / "folder", a=b"old")
    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(Lfm2kitError, match="Input/output error"):
        write(tmp_path / "file", b"new")
    with pytest.raises(Lfm2kitError, match="Input/output error"):
        write_folder(tmp_path / "folder", a=b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert (tmp_path / "folder" / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["file", "folder"]


def refuse_creation(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    open_, touch = Path.open, Path.touch

    def refusing(method: Callable[..., object]) -> Callable[..., object]:
        def call(self: Path, *arguments: object, **options: object) -> object:
            if self.suffix == ".partial":
                raise OSError(number, os.strerror(number))
            return method(self, *arguments, **options)

        return call

    monkeypatch.setattr(Path, "open", refusing(open_))
    monkeypatch.setattr(Path, "touch", refusing(touch))


def test_in_place_a_full_disk_shows_before_the_old_content_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        os.ftruncate(descriptor, offset + 1)  # some of it came to be
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "file"
    path.write_bytes(b"old")
    os.link(path, tmp_path / "other")
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(Lfm2kitError, match="No space left"):
        write(path, b"new and longer")
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("name", ["a b", "ü", "plain"])
def test_a_folder_that_something_is_mounted_on_gets_its_files_one_by_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "outdated").write_bytes(b"old")
    monkeypatch.setattr(folders, "mount_points", lambda: {str(folder)})
    identity = folder.stat().st_ino
    (note,) = write_folder(folder, a=b"1", b=b"2")
    assert "one by one" in note
    assert (folder.stat().st_ino, names(folder), names(tmp_path)) == (identity, ["a", "b"], [name])


def cannot_mount() -> bool:
    """Return whether this process may not mount something in a name space of its own."""
    words = ["unshare", "-m", "true"]
    if shutil.which("unshare") is None:
        return True
    return subprocess.run(words, capture_output=True).returncode != 0


WRITE = """
import sys
from pathlib import Path
from lfm2kit.outputs.files import replaced
from lfm2kit.outputs.folders import replaced_folder
with replaced(Path("file"), print) as file:
    file.write(b"new")
with replaced_folder(Path.cwd() / "a folder", print) as folder:
    (folder / "a").write_bytes(b"new")
"""


@pytest.mark.skipif(cannot_mount(), reason="may not mount")
def test_mounted_files_and_folders_are_written_where_they_are(tmp_path: Path) -> None:
    """As `docker run -v` mounts them."""
    for name in ("file", "host"):
        (tmp_path / name).write_bytes(b"old")
    for name in ("a folder", "host folder"):
        (tmp_path / name).mkdir()
    mounts = 'mount --bind host file && mount --bind "host folder" "a folder" && exec "$@"'
    words = ["unshare", "-m", "sh", "-c", mounts, "sh", sys.executable, "-c", WRITE]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.count("\n")) == (0, 2), done
    assert (tmp_path / "host").read_bytes() == b"new"
    assert (tmp_path / "host folder" / "a").read_bytes() == b"new"
    assert names(tmp_path) == ["a folder", "file", "host", "host folder"]


# ---- pipes and devices ----


@pytest.fixture
def pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(files, "READER_WAIT", 0.2)
    return tmp_path / "pipe"


def test_a_pipe_that_nobody_reads_is_said_and_then_an_error(pipe: Path) -> None:
    notes: list[str] = []
    check_target("--outputs", pipe)
    with pytest.raises(Lfm2kitError, match="nobody reads this pipe"), replaced(pipe, notes.append):
        pass
    assert len(notes) == 1
    assert "waiting for a reader" in notes[0]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_pipe_gets_all_that_is_written(pipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a pipe holds at once."""
    monkeypatch.setattr(files, "READER_WAIT", 60)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    write(pipe, bytes(10**6))
    reader.join()
    assert read == [bytes(10**6)]


def test_a_pipe_without_a_name_in_a_folder_is_written() -> None:
    """A shell's >(command) is /dev/fd/63, which leads to no path."""
    reading, writing = os.pipe()
    path = Path(f"/dev/fd/{writing}")
    check_target("--json", path)
    write(path, b"new")
    os.close(writing)
    with open(reading, "rb") as file:
        assert file.read() == b"new"


@pytest.mark.parametrize("make", [os.mkdir, lambda path: os.mknod(path, stat.S_IFSOCK | 0o600)])
def test_what_cannot_be_written_is_said_before_the_work(
    make: Callable[[Path], None], tmp_path: Path
) -> None:
    make(tmp_path / "target")
    with pytest.raises(Lfm2kitError, match=r"--json .*target: this is"):
        check_target("--json", tmp_path / "target")


def test_a_link_to_itself_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("link")
    with pytest.raises(Lfm2kitError, match=r"--json .*link"):
        check_target("--json", tmp_path / "link")


# ---- what killed runs leave ----

TOKEN = "0123abcd"


@pytest.fixture
def dead() -> int:
    """Return the id of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.fixture
def alive() -> Iterator[int]:
    process = subprocess.Popen(["sleep", "100"])
    yield process.pid
    process.kill()
    process.wait()


def test_the_next_run_removes_what_a_killed_one_left(tmp_path: Path, dead: int) -> None:
    (tmp_path / f".file.{dead}-{TOKEN}.partial").write_bytes(b"half")
    (tmp_path / f".folder.{dead}-{TOKEN}.partial").mkdir()
    (tmp_path / f".folder.{dead}-{TOKEN}.partial" / "a").write_bytes(b"half")
    write(tmp_path / "file", b"new")
    write_folder(tmp_path / "folder", a=b"new")
    assert names(tmp_path) == ["file", "folder"]


def test_what_is_not_ours_or_not_dead_stays(tmp_path: Path, dead: int, alive: int) -> None:
    kept = [
        f".file.{alive}-{TOKEN}.partial",  # a run that goes on
        f".other.{dead}-{TOKEN}.partial",  # another target's
        ".file.partial",
        f".file.{dead}.partial",
        f"file.{dead}-{TOKEN}.partial",
        f".file.{dead}-{TOKEN}.partial.txt",
    ]
    for name in kept:
        (tmp_path / name).write_bytes(b"precious")
    if os.geteuid() == 0:
        foreign = f".file.{dead}-ffffffff.partial"
        (tmp_path / foreign).write_bytes(b"precious")
        os.chown(tmp_path / foreign, 12345, -1)
        kept.append(foreign)
    write(tmp_path / "file", b"new")
    assert names(tmp_path) == sorted(["file", *kept])


def test_a_partial_file_that_a_run_on_another_machine_writes_stays(
    tmp_path: Path, dead: int
) -> None:
    """Its process is not to be seen from here, but it holds the lock."""
    path = tmp_path / f".file.{dead}-{TOKEN}.partial"
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        write(tmp_path / "file", b"new")
        assert names(tmp_path) == [path.name, "file"]
    write(tmp_path / "file", b"newer")
    assert names(tmp_path) == ["file"]


def test_in_a_container_the_killed_run_may_have_had_our_number(tmp_path: Path) -> None:
    beside(tmp_path / "file", "partial").write_bytes(b"half and much longer than new")
    write(tmp_path / "file", b"new")
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"new"


def test_two_runs_of_one_number_do_not_write_into_one_partial_file(tmp_path: Path) -> None:
    """In two containers that share a folder, say."""
    with replaced(tmp_path / "file") as first:
        write(tmp_path / "file", b"second")
        first.write(b"first")
    assert (tmp_path / "file").read_bytes() == b"first"
    assert names(tmp_path) == ["file"]


def test_a_folder_that_was_moved_aside_gets_its_name_back(tmp_path: Path, dead: int) -> None:
    """A run was killed after it had moved the old folder away, before it moved the new one in."""
    old = tmp_path / f".folder.{dead}-{TOKEN}.old"
    old.mkdir()
    (old / "a").write_bytes(b"precious")
    with pytest.raises(KeyboardInterrupt), replaced_folder(tmp_path / "folder"):
        raise KeyboardInterrupt
    assert (tmp_path / "folder" / "a").read_bytes() == b"precious"
    assert names(tmp_path) == ["folder"]


KILLED = """
import os, signal
from pathlib import Path
from lfm2kit.outputs.files import replaced
with replaced(Path("file")) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_run_that_is_killed_leaves_one_file_that_the_next_one_removes(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED], cwd=tmp_path, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 1
    write(tmp_path / "file", b"new")
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["a" * 255, "ä" * 127, "b" * 221])
def test_a_name_may_be_as_long_as_the_system_takes(tmp_path: Path, name: str) -> None:
    check_target("--outputs", tmp_path / name)
    with replaced(tmp_path / name) as file:
        file.write(b"x")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    other = beside(tmp_path / (name[:-1] + "c"), "old")
    assert beside(tmp_path / name, "old").name.split("-")[0] != other.name.split("-")[0]


def test_a_name_that_is_too_long_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(Lfm2kitError, match="name too long"):
        check_target("--outputs", tmp_path / ("a" * 256))
    with pytest.raises(Lfm2kitError, match="name too long"), replaced(tmp_path / ("a" * 256)):
        pytest.fail("the work was begun")
