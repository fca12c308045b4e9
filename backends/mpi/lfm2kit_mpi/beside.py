"""Runs the hub of a job that this program did not start, in a separate process beside rank 0.

A thread would end with rank 0, and could not run while a kernel holds Python's lock there.

    python -m lfm2kit_mpi.beside SOCKET SIZE DEADLINE KEY_PIPE
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress

from lfm2kit import progress
from lfm2kit.text import indented, shortened
from lfm2kit_mpi import hub as hubs
from lfm2kit_mpi.ancestors import Launcher, launcher_of
from lfm2kit_mpi.faults import Fault
from lfm2kit_mpi.hub import LOOK, Hub
from lfm2kit_mpi.shared_memory import drop_names_of

TO_END = 1.0  # seconds for ranks to end when told to


def start_hub(size: int) -> tuple[list[str], int, str]:
    """Start the hub's process, and return its addresses, its port and the job's key."""
    key = hubs.new_key()
    read, write = os.pipe()
    with hubs.listening() as listener:
        inherited = (listener.fileno(), read)
        deadline = progress.THIS_PROCESS.deadline
        words = map(str, (listener.fileno(), size, deadline, read))
        subprocess.Popen(
            [sys.executable, "-P", "-m", "lfm2kit_mpi.beside", *words],
            pass_fds=inherited, start_new_session=True, stdin=subprocess.DEVNULL, stdout=2,
        )  # fmt: skip
        port = listener.getsockname()[1]
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        pipe.write(key)
    return hubs.addresses(), port, key


def main() -> None:
    listener, size, deadline, pipe = sys.argv[1:]
    with os.fdopen(int(pipe)) as words:
        key = words.read()
    asyncio.run(_watch(socket.socket(fileno=int(listener)), Hub(int(size), float(deadline), key)))


async def _watch(listener: socket.socket, hub: Hub) -> None:
    launcher = launcher_of(os.getppid())
    server = await asyncio.start_server(hub.serve, sock=listener, limit=hubs.LONGEST_LINE)
    while not hub.is_over:
        hub.look()
        await asyncio.sleep(LOOK)
    await hub.hear_out()
    fault = hub.explain()
    if fault is not None:
        _say(fault)
        await _end(hub, fault.exit_code, launcher)
    server.close()


async def _end(hub: Hub, exit_code: int, launcher: Launcher | None) -> None:
    """End every rank, and then the launcher, which may wait for a machine that is cut off."""
    drop_names_of(hub.processes_here())
    hub.end_ranks(exit_code)
    await asyncio.sleep(TO_END)
    for pid in hub.processes_here():
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    if launcher is not None:
        launcher.send(signal.SIGTERM)
        await asyncio.sleep(TO_END)
        launcher.send(signal.SIGKILL)


def _say(fault: Fault) -> None:
    details = "".join(f"{line}\n" for line in indented(fault.details))
    with suppress(OSError):
        sys.stderr.write(f"{details}lfm2kit: error: {shortened(fault.sentence)}\n")
        sys.stderr.flush()


if __name__ == "__main__":
    main()
