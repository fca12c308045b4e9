"""`lfm2kit transports`: whether a transport keeps its contract, on real ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lfm2kit import progress as steps
from lfm2kit.backend import Context
from lfm2kit.building.answers import Answers
from lfm2kit.building.loading import EMBEDDED
from lfm2kit.building.options import About
from lfm2kit.building.plugins import find_transport, installed_plugins
from lfm2kit.checkpoint import open_checkpoint
from lfm2kit.cli.console import progress
from lfm2kit.cli.help import PlainCommand, PlainGroup
from lfm2kit.cli.new_package import IntoOption, show_package
from lfm2kit.cli.options import JsonOption, flags
from lfm2kit.cli.ranks import ending_all_ranks
from lfm2kit.cli.report import Report
from lfm2kit.errors import Lfm2kitError, Option
from lfm2kit.memory import HOST, Memory
from lfm2kit.specs import Experts, leaves
from lfm2kit.transport import World

if TYPE_CHECKING:  # the conformance suite takes a while to import
    from lfm2kit.testing.runner import Result

EXCHANGE = "exchange"  # the check that depends on a memory

transports = typer.Typer(
    cls=PlainGroup, help="Check a transport or begin one.", no_args_is_help=True
)

NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="The transport, as `lfm2kit plugins` lists it.")
]
RanksOption = Annotated[int, flags("ranks", About("Number of ranks of each job.", least=1))]
BackendOption = Annotated[
    str | None,
    flags(
        "backend",
        About("Check the exchange in this backend's memory.", "in the host's", metavar="NAME"),
    ),
]


@transports.command("check", cls=PlainCommand)
def check(
    name: NameArgument,
    ranks: RanksOption = 2,
    backend: BackendOption = None,
    only: Annotated[
        str | None, typer.Option(metavar="ID,...", help="Run only these checks. \\[default: all]")
    ] = None,
    json: JsonOption = None,
) -> None:
    """Start a job for each check of a transport, and exit with code 1 if one fails."""
    from lfm2kit.cli.verdicts import conclude
    from lfm2kit.testing.jobs import run_job_check, selected

    report = Report(json, "lfm2kit transports check")
    launcher = find_transport(name).launcher
    ids = selected(None if only is None else only.split(","))
    if (size := launcher.world_size()) is not None:
        raise Lfm2kitError(f"this is a rank of a job of {size}; the checks start jobs themselves")
    memory = _memory_of(backend, World())
    results = []
    with progress(f"checking {name}", len(ids), "checks") as advance:
        for one in ids:
            result = run_job_check(one, name, launcher, ranks, backend)
            results.append(_with_place(result, memory))
            advance(1)
    given = [Option("ranks", ranks)] + ([Option("backend", backend)] if backend is not None else [])
    conclude(report, "transport", name, results, given)


def _with_place(result: Result, memory: Memory) -> Result:
    """Return a result that says for which memory the exchange was checked, if it passed."""
    if result.id != EXCHANGE or result.verdict != "passed":
        return result
    if memory.name == HOST.name:
        where = "only through the host's memory; --backend NAME checks a GPU's"
    else:
        where = f"in the memory '{memory.name}'"
    return result._replace(detail=where)


@transports.command("new", cls=PlainCommand)
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The name of your transport.")],
    into: IntoOption = None,
) -> None:
    """Begin a package with a transport of your own, which passes all checks."""
    from lfm2kit.authoring.package import new_package

    show_package(
        new_package("transport", name, into),
        f"the transport '{name}', which connects ranks on one machine",
        f"lfm2kit transports check {name}",
        f"lfm2kit run --transport {name} --ranks 2 -v",
    )


@transports.command("rank", cls=PlainCommand, hidden=True)
def rank(
    name: NameArgument,
    check_id: Annotated[str, typer.Argument(metavar="ID", help="The check.")],
    ranks: Annotated[int, typer.Argument(metavar="RANKS")],
    backend: Annotated[str | None, typer.Argument(metavar="BACKEND")] = None,
) -> None:
    """Do the part of one rank in a check; `lfm2kit transports check` starts it."""
    from lfm2kit.testing.jobs import JOB_CHECKS, exit_code_of, joined, run_on_rank, selected

    (check_id,) = selected([check_id])
    steps.set_deadline(JOB_CHECKS[check_id].deadline)
    transport = joined(find_transport(name).launcher, ranks)
    with ending_all_ranks(transport):
        run_on_rank(check_id, transport, _memory_of(backend, transport.world))
        raise typer.Exit(exit_code_of(check_id, transport))


def _memory_of(backend: str | None, world: World) -> Memory:
    """Return the memory in which a backend has experts; the host's without a backend."""
    if backend is None:
        return HOST
    context = Context("fp32", None, world.local_size, world.local_rank)
    created = installed_plugins().creator(context)(backend)
    model = open_checkpoint(EMBEDDED / "tiny").spec
    experts = next(leaf for leaf in leaves(model) if isinstance(leaf, Experts))
    return Answers(created, backend).memory(experts)
