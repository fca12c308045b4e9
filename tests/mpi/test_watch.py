"""Who is at fault, from what ranks have said; and what a rank leaves behind.  No MPI is started."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import pytest

pytest.importorskip("lfm2kit_mpi", reason="the MPI transport is a distribution of its own")

from lfm2kit_mpi import hub as hubs
from lfm2kit_mpi import watch
from lfm2kit_mpi.faults import Fault, Rank, culprit, gone, lingering, not_joined, place, stuck
from lfm2kit_mpi.hub import LOOK, TO_DOUBT, Hub
from lfm2kit_mpi.job import run_job
from lfm2kit_mpi.page import SharedPage, reader_of
from lfm2kit_mpi.shared_memory import drop_names
from lfm2kit_mpi.watch import notice_cuts

from lfm2kit import progress
from lfm2kit.errors import Lfm2kitError
from lfm2kit.transport import JobError

NOW = 1000.0


def rank(
    number: int, *, quiet: float = 0, still: float = 0, waiting: bool = False, limit: float = 60
) -> Rank:
    doing = "waiting in all_to_all after layers.2.router" if waiting else "layers.2.operator"
    return Rank(
        number, f"node{number}", 4711, "", NOW - quiet, NOW - still,
        doing=doing, is_waiting=waiting, seconds=limit,
    )  # fmt: skip


def test_ranks_that_go_on_and_those_that_wait_for_them_are_not_at_fault() -> None:
    ranks = [rank(0, still=300, waiting=True), rank(1, still=59), rank(2, still=300, limit=400)]
    assert stuck(ranks, NOW) is None
    done = rank(3, quiet=300, still=300)
    done.is_done = True
    assert stuck([*ranks, done], NOW) is None


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        (
            [rank(0, still=70, waiting=True), rank(1, still=61)],
            "rank 1 on node1, layers.2.operator: no progress for 61 s; "
            "if it is only slow, give a longer --deadline",
        ),
        (
            [rank(0, still=61, waiting=True), rank(1, quiet=62, still=62)],
            "rank 1 on node1, layers.2.operator: "
            "it is hung or cut off, and has said nothing for 62 s",
        ),
        (
            [rank(0, still=61, waiting=True), rank(1, quiet=59, still=61)],
            "rank 1 on node1, layers.2.operator: "
            "it is hung or cut off, and has said nothing for 59 s",
        ),
        (
            [rank(0, still=61, waiting=True), rank(1, still=65, waiting=True)],
            "rank 1 on node1, waiting in all_to_all after layers.2.router: no progress for 65 s, "
            "and every other rank waits too; a connection between two of them is cut, or they do "
            "not make the same calls",
        ),
    ],
    ids=["slow", "silent", "silent-soon-after-a-step", "all-wait"],
)
def test_the_rank_that_others_wait_for_is_named(ranks: list[Rank], said: str) -> None:
    fault = stuck(ranks, NOW)
    assert fault is not None
    assert (fault.sentence, fault.exit_code) == (said, 3)


def test_a_process_that_does_not_end_after_its_work_is_at_fault() -> None:
    ranks = [rank(0, quiet=59), rank(1, quiet=70)]
    assert lingering(ranks, NOW, 60) is None
    fault = lingering(ranks[1:], NOW, 60)
    assert fault is not None
    assert fault.sentence.endswith("its work is done, but it has not ended for 60 s")
    assert lingering([], NOW, 60) is None


def test_the_cause_of_a_rank_s_end_is_said_as_far_as_it_is_known() -> None:
    one = rank(1)
    assert gone(one).sentence.endswith("its process ended before its work was done")
    assert "signal 9 (SIGKILL), as the system does where memory" in gone(one, 9).sentence
    assert gone(one, 15).sentence.endswith("its process was ended by signal 15 (SIGTERM)")
    one.last_words = "Segmentation fault"
    assert gone(one, 11).sentence.endswith("its process crashed: Segmentation fault")
    assert "no word from ranks 1, 3 of 4 within 63 s" in not_joined(4, [0, 2], 63).sentence


@pytest.fixture
def hub(request: pytest.FixtureRequest) -> Iterator[tuple[Hub, int]]:
    """Yield a hub that runs in a thread, of one rank or of `request.param`, and its port."""
    hub, port = Hub(getattr(request, "param", 1), 60, "the key"), 0
    is_ready, is_over = threading.Event(), threading.Event()

    async def serve() -> None:
        nonlocal port
        with hubs.listening() as listener:
            port = listener.getsockname()[1]
            server = await asyncio.start_server(hub.serve, sock=listener)
            is_ready.set()
            while not is_over.is_set():
                await asyncio.sleep(LOOK / 10)
            server.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    is_ready.wait()
    yield hub, port
    is_over.set()
    thread.join()


def test_only_who_knows_the_key_of_a_job_is_heard(hub: tuple[Hub, int]) -> None:
    watched, port = hub
    with pytest.raises(Lfm2kitError, match=rf"tried port {port} at 127\.0\.0\.1\. Let"):
        watch.joined(0, ["127.0.0.1"], port, "another key")
    assert not watched.ranks
    mine = watch.joined(0, ["127.0.0.1"], port, "the key")
    mine.done(1)
    until(lambda: watched.exit_code == 1)
    assert watched.explain() is None


def test_what_a_rank_prints_arrives_byte_by_byte_and_its_failure_after_it(
    hub: tuple[Hub, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "THIS_PROCESS", progress.Progress())
    watched, port = hub
    printed: list[tuple[str, bytes]] = []
    watched.pass_on = lambda stream, data: printed.append((stream, data))
    mine = watch.joined(0, ["127.0.0.1"], port, "the key")
    data = bytes(range(256))
    mine.send(stream="stdout", text=data.decode("latin-1"))
    mine.report(2, "no such file", "")
    until(lambda: watched.explain() is not None)
    assert printed == [("stdout", data)]
    fault = watched.explain()
    assert fault is not None
    assert fault.sentence.endswith("starting: no such file")
    assert fault.exit_code == 2


class Scene:
    """Two ranks that end while their hub has no core."""

    def __init__(self, hub: Hub, port: int) -> None:
        self.hub = hub
        self.ranks = [watch.joined(number, ["127.0.0.1"], port, "the key") for number in (0, 1)]
        self._may_go_on = threading.Event()
        is_held = threading.Event()
        hub.pass_on = lambda *_: (is_held.set(), self._may_go_on.wait())[0]
        self.ranks[0].send(stream="stdout", text="")
        is_held.wait()  # in the hub's only thread

    def say(self, number: int, words: bytes) -> None:
        self.ranks[number]._link.sendall(words)

    def end(self, *numbers: int) -> None:
        for number in numbers:
            self.ranks[number]._link.shutdown(socket.SHUT_RDWR)

    def verdict(self, number: int | None = None, pid: int | None = None) -> Fault:
        """Return what the hub says of it, once it has a core again and has heard them out."""
        self._may_go_on.set()
        asyncio.run(self.hub.hear_out())
        fault = self.hub.explain(number, pid)
        assert fault is not None
        return fault


@pytest.fixture
def scene(hub: tuple[Hub, int]) -> Scene:
    return Scene(*hub)


two_ranks = pytest.mark.parametrize("hub", [2], indirect=True)
any_order = pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["rank-0-first", "rank-1-first"])


@two_ranks
@any_order
@pytest.mark.parametrize("cause", ["Segmentation fault", "Aborted"])
def test_a_rank_that_crashed_is_named_in_whichever_order_the_ranks_ended(
    scene: Scene, order: tuple[int, int], cause: str
) -> None:
    scene.say(1, f"Fatal Python error: {cause}\n\nCurrent thread:\n".encode())
    scene.end(*order)
    here = scene.hub.ranks[0].pid
    assert scene.verdict(9, here).sentence.endswith(f"crashed: {cause}")
    assert scene.verdict().sentence.startswith("rank 1 ")


@two_ranks
@any_order
@pytest.mark.parametrize("talks", [0, 1])
def test_a_rank_that_was_killed_is_named_as_it_ended_first(
    scene: Scene, order: tuple[int, int], talks: int
) -> None:
    """Whatever is still to be read from either of the two."""
    scene.ranks[talks].tell()
    scene.end(*order)
    sentence = scene.verdict().sentence
    assert sentence.startswith(f"rank {order[0]} ")
    assert sentence.endswith("its process ended before its work was done")


@two_ranks
@pytest.mark.parametrize("ended", [(), (1,), (1, 0)], ids=["none-ended", "it-ended", "both-ended"])
def test_a_rank_that_raised_is_named_if_no_other_ended_before_it(
    scene: Scene, ended: tuple[int, ...]
) -> None:
    scene.ranks[1].report(3, "RuntimeError: no", "")
    scene.end(*ended)
    fault = scene.verdict()
    assert fault.sentence.startswith("rank 1 ")
    assert fault.sentence.endswith("RuntimeError: no")


@two_ranks
@pytest.mark.parametrize("ended", [(0,), (0, 1)], ids=["it-ended", "both-ended"])
def test_a_rank_that_ended_is_named_before_one_that_then_raised(
    scene: Scene, ended: tuple[int, ...]
) -> None:
    """MPICH may say that a collective has succeeded, though it has left memory as it was."""
    scene.end(0)
    scene.ranks[1].report(3, "IndexError: a number that makes no sense", "")
    scene.end(*ended[1:])
    sentence = scene.verdict().sentence
    assert sentence.startswith("rank 0 ")
    assert sentence.endswith("its process ended before its work was done")


@two_ranks
@pytest.mark.parametrize("looks", [1, TO_DOUBT + 1])
def test_a_rank_that_raised_is_doubted_until_it_is_clear_that_no_other_has_ended(
    hub: tuple[Hub, int], looks: int
) -> None:
    """What was wrong may come from a rank whose end the system has not told yet."""
    watched, port = hub
    ranks = [watch.joined(number, ["127.0.0.1"], port, "the key") for number in (0, 1)]
    ranks[1].report(3, "IndexError: a number that makes no sense", "")
    until(lambda: bool(watched._claims))
    for _ in range(looks):
        watched.look()
    ranks[0]._link.shutdown(socket.SHUT_RDWR)
    until(lambda: bool(watched.left))
    fault = watched.explain()
    assert fault is not None
    assert fault.sentence.startswith("rank 0 " if looks < TO_DOUBT else "rank 1 ")


@two_ranks
@pytest.mark.parametrize("cause", ["interrupted", "cut off"])
def test_a_rank_that_others_made_end_is_named_only_if_no_other_has_ended(
    scene: Scene, cause: str
) -> None:
    first, code = scene.ranks[0], 143 if cause == "interrupted" else 3
    if cause == "cut off":
        with pytest.raises(ConnectionError), first.waiting_in("all_to_all"):
            raise ConnectionError
    first.report(code, cause, "")
    scene.end(1)
    assert scene.verdict().sentence.startswith("rank 1 ")
    scene.hub.fault = None
    scene.hub.ranks[1].is_done = True
    fault = scene.verdict()
    assert (fault.sentence.split(",")[0], fault.exit_code) == (
        "rank 0 on " + socket.gethostname(),
        code,
    )
    assert fault.sentence.endswith(cause)
    assert scene.hub.is_cut_short


def test_a_signal_that_no_launcher_sends_outranks_an_earlier_end() -> None:
    first, second = rank(0), rank(1)
    second.pid = 4712
    fault = culprit([first, second], [first, second], 11, 4712)
    assert fault is not None
    assert fault.sentence.endswith("its process was ended by signal 11 (SIGSEGV)")
    killed = culprit([first, second], [first, second], 9, 4712)
    assert killed is not None
    assert killed.sentence.startswith("rank 0 ")


def test_a_rank_that_crashed_but_has_not_ended_yet_is_named() -> None:
    """Writing a core file may take longer than the deadline."""
    crashed = rank(1, quiet=61)
    crashed.last_words = "Aborted"
    fault = stuck([rank(0, still=62, waiting=True), crashed], NOW)
    assert fault is not None
    assert fault.sentence.endswith("crashed: Aborted")


def test_a_hub_that_was_stopped_blames_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    now = monotonic()
    hub = Hub(1, 60, "key")
    hub.ranks[0] = Rank(0, "here", 1, "", now, now, seconds=60)
    monkeypatch.setattr(hubs, "monotonic", lambda: now + 3600)
    hub.look()
    assert hub.fault is None


@pytest.mark.parametrize("seconds", [1, 60, 10**3, 10**15])
def test_a_connection_takes_every_deadline(seconds: int) -> None:
    with socket.socket() as link:
        notice_cuts(link, seconds)
        assert link.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            timeout = link.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
            assert timeout == 1000 * min(seconds, watch.LONGEST_SILENCE)


def until(is_so: object, seconds: float = 60) -> None:
    assert callable(is_so)
    end = monotonic() + seconds
    while not is_so():
        assert monotonic() < end
        threading.Event().wait(0.01)


@pytest.mark.parametrize(
    ("script", "said"),
    [("echo no such host >&2; exit 1", "no such host"), ("exit 0", "it said nothing")],
)
def test_an_mpiexec_that_starts_no_rank_is_the_user_s_to_change(script: str, said: str) -> None:
    with pytest.raises(Lfm2kitError, match=f"mpiexec started no rank: {said}"):
        run_job(["sh", "-c", script], 2)


def test_a_rank_that_a_signal_ends_before_it_has_joined_is_a_fault_that_names_it() -> None:
    banner = "EXIT STRING: Segmentation fault (signal 11)\nPlease see the FAQ page"
    with pytest.raises(JobError, match=r"ended by signal 11 \(SIGSEGV\), before") as error:
        run_job(["sh", "-c", f"echo '{banner}'; exit 139"], 2)
    assert error.value.exit_code == 3


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux's memfd_create")
def test_a_page_shows_the_last_step_of_a_process_that_is_dead() -> None:
    script = (
        "import os; from lfm2kit_mpi.page import SharedPage; page = SharedPage()\n"
        "page.write('a long name'); page.write('layers.3'); print(page.fd, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        reader = reader_of(process.pid, int(process.stdout.readline()))
        process.kill()
    assert reader is not None
    assert reader.read() == "layers.3"
    assert reader_of(process.pid, 3) is None
    SharedPage().write("é" * 300)  # cut, not refused
    assert place()


def test_only_the_names_of_mpi_s_segments_are_dropped(tmp_path: Path) -> None:
    segment, other = tmp_path / "mpich_shm_1", tmp_path / "psm_1"
    for path in (segment, other):
        path.touch()
    maps = tmp_path / "maps"
    line = "7f00-7f01 rw-s 00000000 00:1b 42 "
    gone = tmp_path / "mpich_shm_0 (deleted)"
    maps.write_text(f"{line}{segment}\n{line}{other}\n{line}{gone}\n7f02-7f03 r-xp 0 00:00 0\n")
    drop_names(maps, (str(tmp_path / "mpich_"),))
    assert not segment.exists()
    assert other.exists()
