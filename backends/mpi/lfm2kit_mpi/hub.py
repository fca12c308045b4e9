"""The hub, to which every rank of a job reports: it finds faults, and ends all ranks.

With `--ranks` it is part of the process that starts the job; under another launcher it is a process
beside rank 0 (see `lfm2kit_mpi.beside`).  A rank's reports are lines of JSON over TCP.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import math
import os
import secrets
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from typing import Any

from lfm2kit.errors import BUG
from lfm2kit_mpi.ends import Ends
from lfm2kit_mpi.faults import (
    STARTING,
    Fault,
    Rank,
    culprit,
    lingering,
    not_joined,
    place,
    stuck,
)
from lfm2kit_mpi.page import reader_of

LOOK = 0.1  # seconds between two looks at the ranks
TO_DOUBT = 3  # looks at the ranks before one is believed that says why it ends
TO_HEAR = 1.0  # seconds for the last words of ranks to arrive, once one of them has ended
LONGEST_LINE = 1 << 24  # bytes of a message: a rank may print a large table
FATAL = b"Fatal Python error: "  # how Python's fault handler begins


@dataclass(slots=True)
class Claim:
    """The reason that a rank gives for its end, which another rank may have caused."""

    rank: Rank
    fault: Fault
    looks: int = 0  # at the ranks since


class Hub:
    """The ranks that have joined, their last reports, and the job's result or fault."""

    def __init__(self, size: int, deadline: float, key: str) -> None:
        self.size = size
        self.deadline = deadline
        self.key = key
        self.ranks: dict[int, Rank] = {}
        self.fault: Fault | None = None
        self.exit_code: int | None = None  # rank 0's, once it is done
        self.pass_on: Callable[[str, bytes], None] = lambda stream, data: None
        self.broken: BaseException | None = None  # why nothing more can be passed on
        self._claims: list[Claim] = []  # that are neither believed nor doubted yet
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._ends = Ends()
        self._started = self._looked = monotonic()

    @property
    def is_over(self) -> bool:
        """Return whether there is a fault, or every rank is done and gone."""
        has_fault = self.fault is not None or self.broken is not None
        is_complete = len(self.ranks) == self.size and not self.has_ranks
        return has_fault or self.is_cut_short or is_complete

    @property
    def is_cut_short(self) -> bool:
        """Return whether a rank has ended, or was made to end, before it was done."""
        return bool(self.left) or any(rank.ended_by for rank in self.ranks.values())

    @property
    def has_ranks(self) -> bool:
        """Return whether the process of any rank is still connected."""
        return bool(self._writers)

    @property
    def left(self) -> list[Rank]:
        """Return the ranks whose process ended before they were done, in that order."""
        over = [self.ranks[number] for number in self._ends.order if number not in self._writers]
        return [rank for rank in over if not rank.is_done]

    def look(self) -> None:
        """Look for ranks that do not join, make no progress or are silent."""
        now = monotonic()
        pause = now - self._looked
        if pause > 10 * LOOK:  # this process itself was stopped, or had no core
            self._started += pause
            for rank in self.ranks.values():
                rank.heard, rank.moved = rank.heard + pause, rank.moved + pause
        self._looked = now
        for claim in self._claims[:]:
            claim.looks += 1
            if claim.looks >= TO_DOUBT or self._others_ended_before(claim.rank):
                self._judge(claim)
        limit = self.deadline + STARTING
        if self.fault is None and len(self.ranks) < self.size and now - self._started > limit:
            self.fault = not_joined(self.size, self.ranks, limit)
        self.fault = self.fault or stuck(self.ranks.values(), now)
        if len(self.ranks) == self.size and all(rank.is_done for rank in self.ranks.values()):
            connected = [self.ranks[number] for number in self._writers]
            self.fault = self.fault or lingering(connected, now, self.deadline)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection until it ends."""
        rank = None
        try:
            async with asyncio.timeout(self.deadline + STARTING):
                rank = await self._welcome(reader, writer)
            while rank is not None and (line := await reader.readline()):
                self._hear(rank, line)
        except (OSError, ValueError, KeyError, TimeoutError):
            pass  # the connection broke, or its other end is not a rank of this job
        except asyncio.CancelledError:
            pass  # the hub ends: asyncio would print this as an error
        finally:
            writer.close()
            if rank is not None:
                self._leave(rank)

    def _leave(self, rank: Rank) -> None:
        del self._writers[rank.number]
        self._ends.leave(rank.number)

    async def _welcome(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> Rank | None:
        """Return the rank at the other end, if it knows the job's key."""
        nonce = secrets.token_hex(16)
        writer.write(f"{nonce}\n".encode())
        hello = json.loads(await reader.readline())
        known = hmac.compare_digest(hello["proof"], proof(self.key, nonce))
        if not known or hello["rank"] in self.ranks:
            return None
        now = monotonic()
        rank = Rank(
            hello["rank"], hello["host"], hello["pid"], hello["place"], now, now,
            seconds=self.deadline,
            page=reader_of(hello["pid"], hello["page"]) if hello["place"] == place() else None,
        )  # fmt: skip
        self.ranks[rank.number] = rank
        self._writers[rank.number] = writer
        self._ends.watch(rank.number, writer.get_extra_info("socket"))
        writer.write(b"welcome\n")
        return rank

    def _hear(self, rank: Rank, line: bytes) -> None:
        if line.startswith(FATAL):
            rank.last_words = line.removeprefix(FATAL).decode(errors="replace").strip()
        if not line.startswith(b"{"):
            return  # more of the fault handler's words
        said: dict[str, Any] = json.loads(line)
        rank.heard = monotonic()
        if "count" in said:
            rank.seconds = said["seconds"]
            rank.tell(rank.heard, said["count"], said["doing"], said["is_waiting"])
        if "text" in said:
            self._pass_on(said["stream"], said["text"].encode("latin-1"))
        if "reason" in said:
            sentence = f"{rank.where}: {said['reason']}"
            fault = Fault(sentence, said["exit_code"], said["details"])
            if said["is_effect"]:
                rank.ended_by = fault
            else:
                self._claims.append(Claim(rank, fault))
        if "done" in said:
            rank.is_done = True
            if rank.number == 0:
                self.exit_code = said["done"]

    def _others_ended_before(self, rank: Rank) -> bool:
        """Return whether another rank ended early, before `rank` ended or said why it ends.

        What comes from such a rank need not be what it sent, and MPICH may report no error: a block
        may then fail because of a number that makes no sense.  It may even say so before the other
        rank's connection ends, because the system takes its time to end a process.
        """
        return any(not self.ranks[other].is_done for other in self._ends.before(rank.number))

    def _judge(self, claim: Claim) -> None:
        """Decide whether a rank is at fault for its end, or another one that ended before it."""
        self._claims.remove(claim)
        if self._others_ended_before(claim.rank):
            claim.rank.ended_by = claim.fault
        else:
            self.fault = self.fault or claim.fault

    def _pass_on(self, stream: str, data: bytes) -> None:
        try:
            self.pass_on(stream, data)
        except BaseException as error:  # nobody reads it: the job ends as a single process would
            self.broken = error

    def explain(self, number: int | None = None, pid: int | None = None) -> Fault | None:
        """Return the fault, even if only a process's end is known; None if there is no fault.

        `number` is the signal that ended the process `pid`, if a launcher has reported it.  The
        ranks should have been heard out.
        """
        for claim in self._claims[:]:
            self._judge(claim)
        if self.fault is None:
            self.fault = culprit(self.left, self.ranks.values(), number, pid)
        return self.fault

    async def hear_out(self) -> None:
        """Wait for what ranks said last: it may be on its way when others have ended already."""
        await until(lambda: self.fault is not None or not self.has_ranks, TO_HEAR)

    def end_ranks(self, exit_code: int = BUG) -> None:
        """Tell every rank to end its process at once."""
        for writer in self._writers.values():
            with suppress(OSError, RuntimeError):
                writer.write(json.dumps({"end": exit_code}).encode() + b"\n")

    def processes_here(self) -> list[int]:
        """Return the process ids of the connected ranks on this machine."""
        here = place()
        connected = map(self.ranks.__getitem__, self._writers)
        return [rank.pid for rank in connected if here and rank.place == here]


async def until(is_so: Callable[[], bool], seconds: float) -> None:
    """Return once `is_so`, or after `seconds` in which this process was not short of a core."""
    pause = LOOK / 2
    for _ in range(math.ceil(seconds / pause)):  # not a time: one long pause would pass for many
        if is_so():
            return
        await asyncio.sleep(pause)


def proof(key: str, nonce: str) -> str:
    """Return proof that its sender has the job's key, without revealing it."""
    return hmac.digest(key.encode(), nonce.encode(), "sha256").hex()


def new_key() -> str:
    return secrets.token_hex(16)


def listening() -> socket.socket:
    """Open a socket for the ranks of a job, on every address of this machine."""
    if socket.has_dualstack_ipv6():
        with suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def addresses() -> list[str]:
    """Return this machine's addresses, the loopback's last."""
    found = dict.fromkeys(_of_interfaces())
    with suppress(OSError):
        infos = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
        found |= dict.fromkeys(str(info[4][0]) for info in infos)
    loopback = [address for address in found if address.startswith("127.")]
    return [a for a in found if a not in loopback] + ["127.0.0.1"]


def _of_interfaces() -> list[str]:
    """Return the IPv4 addresses of Linux's network interfaces; none on other systems."""
    if os.uname().sysname != "Linux":
        return []
    import fcntl

    get_address = 0x8915  # SIOCGIFADDR
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                request = name.encode()[:15].ljust(256, b"\0")
                reply = fcntl.ioctl(asking.fileno(), get_address, request)
                found.append(socket.inet_ntoa(reply[20:24]))
    return found
