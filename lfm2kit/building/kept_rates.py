"""Keeps the rates of this machine between commands, in a folder beside the compiled kernels.

A file's name changes with the machine, its software and the threads that compute: rates of another
machine are not read, even from a home folder that several machines share.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from lfm2kit.backend import Context
from lfm2kit.building.rates import MADE_BY, Calibration, Experts, read_calibration
from lfm2kit.errors import Lfm2kitError
from lfm2kit.kernel_cache import (
    VARIABLE,
    UnusableError,
    check_kept,
    locked,
    make_folder,
    root_folder,
)
from lfm2kit.records.machine import described

FOLDER = "rates"
NO_NAME = "a device without a name"
UNKNOWN = "unknown"  # a name that one of two descriptions does not have
LONGEST_TURN = 180.0  # seconds that another calibration is waited for; it takes less than a minute


def kept_file(described: Mapping[str, str]) -> Path:
    """Return where the rates of a machine are kept.

    Raise `Lfm2kitError` without a home folder, and if somebody who is not trusted may write there.
    """
    root = root_folder()
    if root is None:
        raise Lfm2kitError(f"there is no home folder; {VARIABLE} can name another one")
    text = "\0".join(f"{name}\0{value}" for name, value in described.items())
    path = root / FOLDER / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    try:
        check_kept(path.parent)
        check_kept(path)
    except UnusableError as error:
        raise Lfm2kitError(f"{error}; {VARIABLE} can name another folder") from None
    return path


def read_kept(context: Context) -> tuple[Path, Calibration]:
    """Return the file that is kept for this machine, and what it says.

    Raise `Lfm2kitError` if there is none, or it cannot be read.
    """
    path = kept_file(described(context))
    if not os.path.exists(path):  # not Path's: that raises where a name is too long
        raise Lfm2kitError(
            f"no rates are kept for this machine and these threads; {MADE_BY}, for this model, "
            "these backends and this precision"
        )
    return path, read_calibration(path)


def check_hardware(path: Path, calibration: Calibration, key: Experts, now: dict[str, str]) -> None:
    """Raise `Lfm2kitError` if experts were measured on another device than the present one."""
    for side in calibration.sides:
        if side.experts == key and side.hardware != now:
            then, there = (", ".join(names.values()) or NO_NAME for names in (side.hardware, now))
            raise Lfm2kitError(f"{path}: rates of {then}, but this is {there}; {MADE_BY}")


def differences(then: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    """Yield in words what two descriptions of a machine or a device do not have in common."""
    for name in dict.fromkeys([*now, *then]):
        there, here = (names.get(name, UNKNOWN) for names in (then, now))
        if there != here:
            yield f"{name} {there}, here {here}"


def with_kept(calibration: Calibration) -> tuple[Path, Calibration]:
    """Return the file to keep a calibration in, and the calibration with what is kept there.

    What was measured again replaces what is kept.  Make the folder if that is possible, and raise
    `Lfm2kitError` if there is no home folder.
    """
    path = kept_file(calibration.machine)
    with suppress(Lfm2kitError):  # nothing is there, or nothing that can be used
        calibration = read_calibration(path).replaced_by(calibration)
    with suppress(OSError):  # then the file cannot be written, and that is an error
        make_folder(path.parent.parent, FOLDER)
    return path, calibration


@contextmanager
def turn(note: Callable[[str], None]) -> Iterator[None]:
    """Let one process at a time measure, and keep what it has measured.

    If another one is measuring, call `note` with a sentence and wait.  Raise `Lfm2kitError` if that
    takes too long.  Where no folder can be locked, nobody waits.
    """
    descriptor = _opened_folder()
    try:
        if descriptor is not None:
            with suppress(OSError):  # of a file system without locks
                _wait_for_turn(descriptor, note)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _opened_folder() -> int | None:
    """Return a descriptor of the folder of rates; None where `kept_file` will say why not."""
    root = root_folder()
    if root is None:
        return None
    try:
        make_folder(root, FOLDER)
        check_kept(root / FOLDER)
        return os.open(root / FOLDER, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except (OSError, UnusableError):
        return None


def _wait_for_turn(descriptor: int, note: Callable[[str], None]) -> None:
    give_up, is_noted = time.monotonic() + LONGEST_TURN, False
    while not locked(descriptor):
        if not is_noted:
            note("another lfm2kit calibrate is measuring; waiting until it has ended")
            is_noted = True
        if time.monotonic() > give_up:
            raise Lfm2kitError(
                f"another lfm2kit calibrate has not ended after {LONGEST_TURN:g} s; end it, and "
                "measure again"
            )
        time.sleep(0.1)
