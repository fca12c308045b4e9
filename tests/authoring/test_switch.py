"""The switch of the transport that authors begin with: it names each fault, and no rank waits.

`tests/plugins/test_installed.py` runs the whole suite of checks on it, on real ranks.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from multiprocessing import Pipe
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import lfm2kit.authoring
from lfm2kit.progress import Step
from lfm2kit.transport import JobError

TEMPLATE = Path(lfm2kit.authoring.__file__).parent / "templates" / "transport"
SWAP = ("swap", [None, None])

Run = Callable[..., int]


@pytest.fixture
def switch(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TEMPLATE))
    from lfm2kit_transport import switch

    return switch


@pytest.fixture
def run(switch: ModuleType) -> Run:
    """Run a job whose ranks send these messages; a process ends then, unless `...` comes last."""

    def run(*sent: list[Any], ended: tuple[int, ...] = ()) -> int:
        ranks = []
        for number, messages in enumerate(sent):
            ours, its = Pipe()
            for message in messages:
                if message is not ...:
                    its.send(message)
            if ... not in messages:
                its.close()
            process = SimpleNamespace(poll=lambda code=0 if number in ended else None: code)
            process.kept = its
            ranks.append(switch.Rank(process, ours))
        return switch.Switch(ranks).run()

    return run


def test_rank_0_has_the_exit_code(run: Run) -> None:
    assert run([("finish", 5)], [("finish", 1)]) == 5


LATE = ("step", Step(1, "layers.0", -1.0))


@pytest.mark.parametrize(
    ("sent", "says"),
    [
        ([[("finish", 0)], [SWAP, ...]], "rank 1 of 2: it waits for a rank whose work is done"),
        ([[("finish", 0)], []], "rank 1 of 2: its process ended before its work was done"),
        ([[], [SWAP, ...]], "rank 0 of 2: its process ended before its work was done"),
        ([[LATE, ...], [SWAP, ...]], r"rank 0 of 2: layers\.0: no progress"),
        ([[("abort", 3, "no chip", "")], [SWAP, ...]], "rank 0 of 2: no chip"),
    ],
)
def test_a_rank_that_keeps_others_waiting_is_named(run: Run, sent: list[Any], says: str) -> None:
    with pytest.raises(JobError, match=says) as raised:
        run(*sent)
    assert raised.value.exit_code == 3


def test_a_process_that_ends_while_it_waits_is_named(run: Run) -> None:
    with pytest.raises(JobError, match="rank 1 of 2: its process ended while it waited"):
        run([...], [SWAP, ...], ended=(1,))


def test_a_message_that_is_not_understood_is_a_fault_and_no_success(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    raised = queue.SimpleQueue[type[BaseException]]()
    monkeypatch.setattr(threading, "excepthook", lambda args: raised.put(args.exc_type))
    with pytest.raises(JobError, match="rank 0 of 2"):
        run([("swap",), ("finish", 0)], [("finish", 0)])
    assert raised.get(timeout=60) is TypeError  # once the thread has ended, nobody sees it
