"""A signal ends every phase: one line, 128 + its number, no traceback, no partial file.

These send it at chosen moments; `sweep_interrupts.py` beside this file sends it at many times.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from pathlib import Path

import pytest

START = """
import os, sys

number = int(sys.argv.pop(1))

def hit():
    os.kill(os.getpid(), number)

class Importing:  # a signal while a module is imported
    def __init__(self, name, is_swallowed=False):
        self.name, self.is_swallowed = name, is_swallowed
    def find_spec(self, name, path=None, target=None):
        if name == self.name:
            sys.meta_path.remove(self)
            try:
                hit()
            except BaseException:
                if not self.is_swallowed:
                    raise

def replace(name, instead):  # a function that commands call
    from importlib import import_module
    module, _, function = name.rpartition(".")
    setattr(import_module(module), function, instead)

def waits(*arguments, **options):  # longer than any test: what it waits for is the end
    import time
    time.sleep(600)

class Hits:  # what a destructor raises is ignored
    def __del__(self):
        hit()

def in_a_destructor(*arguments, **options):
    Hits()
    waits()

def in_a_callback(*arguments, **options):
    import ctypes
    ctypes.CFUNCTYPE(None)(hit)()
    waits()

def in_a_write(path, *rest):
    from lfm2kit.outputs.files import replaced
    with replaced(path) as file:
        file.write(b"half")
        hit()
        hit()  # as `timeout` does, to the process and to its group

def in_a_deadlock(*arguments, **options):  # in C: no handler runs in the main thread
    import ctypes
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    while True:
        try:
            print("waiting", flush=True)
            libc.pthread_mutex_lock(mutex)
        except KeyboardInterrupt:  # it came before the lock
            pass

def once_more(*arguments, **options):  # the traceback of a bug that an interrupt has caused
    try:
        hit()
        waits()
    except KeyboardInterrupt:
        pass
    raise AttributeError("half imported")
"""
END = """
from lfm2kit.__main__ import script
script()
"""
MOMENTS = {
    "imports": "sys.meta_path.insert(0, Importing('typer'))",
    "numpy": "sys.meta_path.insert(0, Importing('numpy'))",
    "swallowed by an import": "sys.meta_path.insert(0, Importing('pluggy', True))",
    "reading": "replace('lfm2kit.measuring.samples.read_inputs', lambda path: hit())",
    "a callback": "replace('lfm2kit.cli.performing.run_samples', in_a_callback)",
    "a destructor": "replace('lfm2kit.cli.performing.run_samples', in_a_destructor)",
    "a bug that follows": "replace('lfm2kit.cli.performing.run_samples', once_more)",
    "writing": "replace('lfm2kit.measuring.samples.write_outputs', in_a_write)",
    "the end": "import atexit; atexit.register(hit)",
}
LINES = {
    signal.SIGINT: "lfm2kit: interrupted\n",
    signal.SIGTERM: "lfm2kit: interrupted by SIGTERM\n",
    signal.SIGHUP: "lfm2kit: interrupted by SIGHUP\n",
}
RUN = ["run", "-b", "reference", "-n", "1", "--outputs", "outputs.bin"]


def started(
    moment: str, number: signal.Signals, folder: Path, *words: str
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", START + moment + END, str(int(number)), *(words or RUN)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
    )


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_ends_every_phase_with_one_line(moment: str, tmp_path: Path) -> None:
    number = list(LINES)[list(MOMENTS).index(moment) % len(LINES)]
    job = started(MOMENTS[moment], number, tmp_path)
    _, err = job.communicate(timeout=120)
    assert (job.returncode, err) == (128 + number, LINES[number])
    left = [path.name for path in tmp_path.iterdir()]  # a whole file, or nothing
    assert left == (["outputs.bin"] if moment == "the end" else []) or (
        moment == "swallowed by an import"  # raised again a little later, when all may be written
        and left == ["outputs.bin"]
    )


def test_the_second_ctrl_c_ends_a_process_that_hangs(tmp_path: Path) -> None:
    job = started(
        "replace('lfm2kit.cli.performing.run_samples', in_a_deadlock)", signal.SIGINT, tmp_path
    )
    assert job.stdout is not None
    while job.stdout.readline() != "waiting\n":
        pass
    while job.poll() is None:  # as somebody who has lost patience
        job.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.wait(0.3)
    assert (job.returncode, job.communicate()[1]) == (130, "lfm2kit: interrupted\n")


def test_a_process_that_hangs_is_ended_after_a_while(tmp_path: Path) -> None:
    moment = "import lfm2kit.process.interrupts; lfm2kit.process.interrupts.PATIENCE = 0.5\n"
    moment += "replace('lfm2kit.cli.performing.run_samples', in_a_deadlock)"
    job = started(moment, signal.SIGTERM, tmp_path)
    assert job.stdout is not None
    while job.stdout.readline() != "waiting\n":
        pass
    job.send_signal(signal.SIGTERM)
    _, err = job.communicate(timeout=120)
    assert (job.returncode, err) == (143, LINES[signal.SIGTERM])


def test_a_signal_that_the_parent_has_ignored_stays_so(tmp_path: Path) -> None:
    """As `nohup` does, and a shell for what it runs in the background."""
    moment = "import signal; signal.signal(number, signal.SIG_IGN)\n" + MOMENTS["reading"]
    moment = moment.replace("hit()", "(hit(), exit)[1]('went on')")
    job = started(moment, signal.SIGHUP, tmp_path)
    _, err = job.communicate(timeout=120)
    assert job.returncode == 3
    assert "went on" in err
    assert "interrupted" not in err
