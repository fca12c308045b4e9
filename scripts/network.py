#!/usr/bin/env python3
"""Runs a command on a network of nodes, all of them on this machine, for jobs of several ranks.

    scripts/network.py --nodes 4 --rate 200mbit -- lfm2kit run --ranks 4 --backend cpu_simd
    scripts/network.py --nodes 2 --ranks-per-node 2 -- mpiexec -n 4 python alltoall.py

A node is a network namespace.  Its one link, eth0, ends at a port of the switch, which is a bridge
in a namespace of its own.  With --rate, both ends of every link send no faster than that.

The command runs in the namespace of the switch.  Environment variables tell MPICH's mpiexec where
the nodes are, also the mpiexec that `lfm2kit run --ranks` starts.  To cut off node2 while a job
runs, let a command there call `ip link set port2 down`.

Nothing is left when the command or this process ends, however it ends: the kernel kills all
processes of a process namespace with its first one, and frees namespaces that no process is in.
It needs Linux, iproute2 and MPICH, but not root where the kernel lets users make namespaces.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

USER_ERROR = 2
SUBNET = "10.77.0"
SWITCH = f"{SUBNET}.254"
MOST_NODES = 250  # addresses of the subnet, but the switch's
RATE = "([1-9][0-9]{0,8})([kmg])bit"  # of tc's units, those in which links are sold
MOST_GBIT = 100  # tc counts a link's queue in 32 bits, which end at 343 Gbit/s
MOST_RANKS_PER_NODE = 1000
BURST, QUEUE = "128kb", "100ms"  # what a link sends at once, and how long packets may wait for it
# CLONE_NEW...
NEW_MOUNTS, NEW_USER, NEW_PROCESSES, NEW_NETWORK = 0x00020000, 0x10000000, 0x20000000, 0x40000000
SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# UCX takes shared memory wherever one kernel runs both ranks, which would be past the links.
OVER_THE_LINKS = {"UCX_TLS": "tcp,self", "UCX_NET_DEVICES": "eth0"}
# What UCX does otherwise with large messages over TCP sends one direction after the other.
BOTH_WAYS_AT_ONCE = {"UCX_RNDV_SCHEME": "get_zcopy"}


def main() -> None:
    options = parsed(sys.argv[1:])
    with failing_in_one_line():
        make_namespaces()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # who starts this process may ignore it
    signal.pthread_sigmask(signal.SIG_BLOCK, [*SIGNALS, signal.SIGCHLD])
    first = os.fork()
    if first == 0:
        with failing_in_one_line():
            end_with_parent()
            mount_own_folders()
            make_network(options.nodes, options.rate)
            sys.exit(run(options.command, environment(options.nodes, options.ranks_per_node)))
    sys.exit(exit_code_of(first))


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        fail(message)


def parsed(words: Sequence[str]) -> argparse.Namespace:
    """Return the options of a command line; one that is wrong ends this process."""
    parser = Parser(
        prog="network.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=2, help="number of nodes (default: 2)")
    parser.add_argument(
        "--rate", help="limit of each link in each direction, such as 1gbit or 200mbit"
    )
    parser.add_argument(
        "--ranks-per-node", type=int, default=1,
        help="ranks that mpiexec puts on a node before it goes on to the next (default: 1)",
    )  # fmt: skip
    parser.add_argument("command", nargs="+", help="the command with its arguments, after --")
    options = parser.parse_args(words)
    if not 1 <= options.nodes <= MOST_NODES:
        fail(f"--nodes {options.nodes}: give a number from 1 to {MOST_NODES}")
    if options.rate is not None and not 0 < gbit_of(options.rate) <= MOST_GBIT:
        fail(f"--rate {options.rate}: give a rate such as 200mbit or 1gbit, up to {MOST_GBIT}gbit")
    if not 1 <= options.ranks_per_node <= MOST_RANKS_PER_NODE:
        asked = f"--ranks-per-node {options.ranks_per_node}"
        fail(f"{asked}: give a number from 1 to {MOST_RANKS_PER_NODE}")
    return options


def gbit_of(rate: str) -> float:
    """Return a rate in Gbit/s; 0 if `rate` is not in the form of `RATE`."""
    found = re.fullmatch(RATE, rate)
    return int(found[1]) / {"k": 1e6, "m": 1e3, "g": 1}[found[2]] if found else 0


def make_namespaces() -> None:
    """Put this process into a network and mounts of its own, and its children into a new tree."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "unshare"):
        fail("only Linux has network namespaces")
    user, group = os.geteuid(), os.getegid()
    wanted = NEW_MOUNTS | NEW_PROCESSES | NEW_NETWORK | (NEW_USER if user != 0 else 0)
    if libc.unshare(wanted) != 0:
        reason = os.strerror(ctypes.get_errno())
        fail(f"the kernel does not let this user make namespaces ({reason}): run it as root")
    if user != 0:  # inside, this user has root's rights over what is made there, and no others
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")


def end_with_parent() -> None:
    """Have the kernel kill this process with its parent, which passes signals on to it."""
    os.setsid()
    ctypes.CDLL(None).prctl(SET_DEATH_SIGNAL, signal.SIGKILL)
    for number in SIGNALS:
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [*SIGNALS, signal.SIGCHLD])


def mount_own_folders() -> None:
    """Mount folders for what only this tree of processes has: itself, its nodes and its memory."""
    names = Path("/run/netns")
    if not names.exists() and not os.access(names.parent, os.W_OK):
        fail(f"iproute2 needs the folder {names}, and there is none: make it as root")
    names.mkdir(exist_ok=True)
    call("mount", "--make-rprivate", "/")
    call("mount", "-t", "proc", "proc", "/proc")
    call("mount", "-t", "tmpfs", "names", str(names))
    call("mount", "-t", "tmpfs", "shm", "/dev/shm")  # a killed MPI leaves files there


def make_network(nodes: int, rate: str | None) -> None:
    """Make the switch in this process's namespace, and the nodes `node1`, `node2`, ..."""
    ip("link", "set", "lo", "up")
    ip("link", "add", "switch", "type", "bridge")
    ip("addr", "add", f"{SWITCH}/24", "dev", "switch")
    ip("link", "set", "switch", "up")
    for number in range(1, nodes + 1):
        add_node(f"node{number}", f"port{number}", f"{SUBNET}.{number}")
        if rate is not None:
            limit = ["root", "tbf", "rate", rate, "burst", BURST, "latency", QUEUE]
            call("tc", "-n", f"node{number}", "qdisc", "add", "dev", "eth0", *limit)
            call("tc", "qdisc", "add", "dev", f"port{number}", *limit)
    for number in range(1, nodes + 1):  # MPI finds no link that is not up yet
        while "UP" not in ip("-n", f"node{number}", "-br", "link", "show", "eth0").split():
            time.sleep(0.01)


def add_node(name: str, port: str, address: str) -> None:
    """Add a node whose link ends at the switch's `port`."""
    ip("netns", "add", name)
    ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
    ip("link", "set", port, "master", "switch", "up")
    ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
    ip("-n", name, "link", "set", "lo", "up")
    ip("-n", name, "link", "set", "eth0", "up")


def environment(nodes: int, ranks_per_node: int) -> dict[str, str]:
    """Return the variables by which MPICH's mpiexec finds the nodes, and its ranks their links."""
    hosts = os.memfd_create("hosts")  # a file without a name: nothing of it can stay behind
    for number in range(1, nodes + 1):
        os.write(hosts, f"node{number}:{ranks_per_node}\n".encode())
    return {
        "HYDRA_LAUNCHER": "ssh",
        "HYDRA_LAUNCHER_EXEC": str(Path(__file__).resolve().with_name("enter_node.sh")),
        "HYDRA_HOST_FILE": f"/proc/{os.getpid()}/fd/{hosts}",
        "HYDRA_IFACE": "switch",
        **OVER_THE_LINKS,
    }


def run(command: Sequence[str], variables: dict[str, str]) -> int:
    """Return the exit code of the command; signals are for it alone from now on."""
    job = subprocess.Popen(command, env=BOTH_WAYS_AT_ONCE | os.environ | variables)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    return as_a_shell_says(job.wait())


def exit_code_of(first: int) -> int:
    """Pass signals on to the processes that `first` leads until it ends; return its exit code."""
    while (number := signal.sigwait([*SIGNALS, signal.SIGCHLD])) != signal.SIGCHLD:
        try:
            os.killpg(first, number)
        except ProcessLookupError:  # it does not lead anything yet
            os.kill(first, signal.SIGKILL)
    _, status = os.waitpid(first, 0)
    return as_a_shell_says(os.waitstatus_to_exitcode(status))


def as_a_shell_says(code: int) -> int:
    return code if code >= 0 else 128 - code


def ip(*words: str) -> str:
    return call("ip", *words)


def call(*command: str) -> str:
    """Return what a command printed."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@contextmanager
def failing_in_one_line() -> Iterator[None]:
    """Turn what a machine or a command line can lack into one line."""
    try:
        yield
    except FileNotFoundError as error:
        fail(f"there is no {error.filename} here: install it")
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().splitlines() or [f"exit code {error.returncode}"]
        fail(f"{' '.join(error.cmd)}: {said[0]}")
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}")


def fail(sentence: str) -> NoReturn:
    print(f"network.py: error: {sentence}", file=sys.stderr)
    sys.exit(USER_ERROR)


if __name__ == "__main__":
    main()
