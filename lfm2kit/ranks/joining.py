"""Joins a user's program to the job that it is a rank of."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import numpy.typing as npt

from lfm2kit.building.plugins import find_transport
from lfm2kit.errors import BUG, WRONG_RESULT, Lfm2kitError, Option
from lfm2kit.host_exchange import AUTO as AUTO_EXCHANGE
from lfm2kit.host_exchange import PAST_HOST, THROUGH_HOST
from lfm2kit.memory import HOST
from lfm2kit.ranks import fingerprints
from lfm2kit.ranks.agreement import Fact, Facts, JointError, Refusal, agree, least
from lfm2kit.ranks.groups import Grouping, first_fitting
from lfm2kit.ranks.launchers import DEFAULT_TRANSPORT, started
from lfm2kit.ranks.reasons import reason
from lfm2kit.transport import ExchangeOffer, Launcher, Transport, World

if TYPE_CHECKING:
    from lfm2kit.building.loading import Setup

# Options whose result is compared, or which may differ: machines may have other paths and cores.
NOT_COMPARED = {"model", "backend", "plan", "threads", "seed", "load"}


@contextmanager
def joined_job(transport: str = DEFAULT_TRANSPORT) -> Iterator[Transport]:
    """Join the job that this process is a rank of, and yield what its ranks communicate over.

    A process alone gets a job of one rank.  At the end of the block this rank's work is done: an
    error there ends the job on every rank.  Raise `Lfm2kitError` if a launcher has started several
    processes that cannot be ranks of one job, or if there is no such transport.
    """
    launcher = find_transport(transport).launcher if _may_be_a_rank(transport) else None
    job = connected(launcher) if launcher is not None else None
    if job is None:
        yield Alone()
        return
    try:
        yield job
    except SystemExit as ended:
        job.finish(_exit_code(ended))
        raise
    except BaseException as error:
        code, sentence = reason(error)
        details = "".join(traceback.format_exception(error)) if code == BUG else ""
        job.abort(code, sentence, details)
    job.finish(0)


def connected(launcher: Launcher, otherwise: str = "") -> Transport | None:
    """Return the transport of this process's job; None if it is alone.

    Raise `Lfm2kitError` if a launcher has started several processes that are not ranks of a job;
    `otherwise` says what else the user may do.
    """
    size = launcher.world_size()
    if size is not None:
        return launcher.connect() if size > 1 else None
    if (others := started()) is not None:
        raise Lfm2kitError(
            f"{others}, but not as ranks of one job: each would run everything; "
            f"{others.launcher.advice}{otherwise}"
        )
    return None


def refuse_copies() -> None:
    """Raise `Lfm2kitError` if this process is one of several, each of which would load a model."""
    if (others := started()) is not None:
        raise Lfm2kitError(
            f"{others}, and each would load the whole model; give the job of "
            "`with lfm2kit.joined_job() as job` as job=job, or independent=True if that is what "
            "you want"
        )


def check_alike(job: Transport, setup: Setup) -> None:
    """Raise `Lfm2kitError` on every rank if the ranks are about to build different models."""
    refusal = agree(job, facts_of(setup))
    if refusal is not None:
        raise Lfm2kitError(refusal.sentence)


def fail_together(job: Transport, fault: str | None) -> None:
    """Raise `JointError` on every rank if one has a fault; every rank calls this."""
    refusal = agree(job, {} if fault is None else Refusal(fault))
    if refusal is not None:
        raise JointError(refusal.sentence)


class Again(Protocol):
    """What makes a set-up once more, in other groups or with tokens that go through the host."""

    def __call__(self, *, grouping: Grouping, through_host: str | None = None) -> Setup:
        """Return it; `through_host` says why tokens do not travel past the host."""
        ...


def settled_alike(job: Transport, setup: Setup) -> Setup:
    """Return the set-up that every rank can build and exchange tokens with; every rank calls this.

    Raise `JointError` if the options ask for an exchange past the host and one of the ranks cannot
    use it.
    """
    return exchanging_alike(job, fitting_alike(job, setup))


def fitting_alike(job: Transport, setup: Setup) -> Setup:
    """Return the set-up in groups in which every rank's share fits; every rank calls this.

    A machine may have less memory than the others.
    """
    asked = setup.choices
    mine = asked.index(setup.grouping)
    chosen = first_fitting(asked, lambda one: bool(least(job, asked.index(one) >= mine)))
    return setup if chosen == setup.grouping else setup.again(grouping=chosen)


def exchanging_alike(job: Transport, setup: Setup) -> Setup:
    """Return the set-up with an exchange that has been tried out on all ranks of the job."""
    exchange, groups = setup.options.exchange, setup.grouping.groups
    if exchange == THROUGH_HOST or all(len(group) == 1 for group in groups):
        return setup
    why_not = [why for offer in setup.placed.offers() if (why := _why_not(offer, exchange))]
    refusal = agree(job, Refusal(why_not[0]) if why_not else {})
    if refusal is None:
        return setup
    if exchange == PAST_HOST:
        otherwise = Option("exchange", AUTO_EXCHANGE)
        raise JointError(Option("exchange", exchange), f": {refusal.sentence}; try ", otherwise)
    return setup.again(grouping=setup.grouping, through_host=refusal.sentence)


def _why_not(offer: ExchangeOffer, exchange: str) -> str | None:
    """Return why this rank cannot use an exchange; None if it can."""
    if exchange == PAST_HOST and offer.memory.name == HOST.name:
        return "neither the transport nor a memory of the plan has an exchange past the host"
    return offer.why_not()


def facts_of(setup: Setup, named: Callable[[str], str] = str) -> Facts:
    """Return what all ranks must have in common; `named` returns what users call an option."""
    options = {k: v for k, v in asdict(setup.options).items() if k not in NOT_COMPARED}
    return {
        named("backend"): Fact(str(setup.asked)),
        **{named(name): Fact(str(value)) for name, value in options.items()},
        **facts_of_content(setup),
    }


def facts_of_content(setup: Setup) -> Facts:
    """Return what is read and run, which all ranks must have in common whatever its path is.

    With different loads, ranks would wait for each other's experts at different places.
    """
    load = setup.load
    digest = "not given" if load is None else fingerprints.digest([repr(load).encode()])
    return {
        "the load": Fact(digest),
        **fingerprints.of_memories(setup.placed),
        **fingerprints.of_environment(),
        **fingerprints.of_model(setup.checkpoint),
        **fingerprints.of_code(setup.plugins),
    }


class Alone:
    """The transport of a process that is a job's only rank."""

    world = World()

    def all_to_all(
        self,
        rows: npt.NDArray[Any],
        send_counts: Sequence[int],
        receive_counts: Sequence[int] | None = None,
        into: npt.NDArray[Any] | None = None,
    ) -> tuple[npt.NDArray[Any], list[int]]:
        """Return the rows, which this rank sends to itself; they lie in `into` if it is given."""
        if into is None:
            return rows.copy(), list(send_counts)
        into[...] = rows
        return into, list(send_counts)

    def gather(
        self, rows: npt.NDArray[Any], counts: Sequence[int] | None = None
    ) -> npt.NDArray[Any] | None:
        return rows.copy()

    def barrier(self) -> None:
        """Do nothing: every rank is here."""

    def finish(self, exit_code: int) -> None:
        """Do nothing: the process's own exit code is the job's."""

    def abort(self, exit_code: int, reason: str, details: str = "") -> NoReturn:
        raise Lfm2kitError(reason)


def _may_be_a_rank(transport: str) -> bool:
    """Return whether a transport is needed: the default one need not be installed otherwise."""
    return transport != DEFAULT_TRANSPORT or started() is not None


def _exit_code(ended: SystemExit) -> int:
    if isinstance(ended.code, int):
        return ended.code
    return 0 if ended.code is None else WRONG_RESULT
