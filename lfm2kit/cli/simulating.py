"""`lfm2kit plan --simulate`: what jobs of many ranks would take, by the rates of a calibration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Column

from lfm2kit.backend import Context
from lfm2kit.building.byte_counts import size
from lfm2kit.building.kept_rates import differences, read_kept
from lfm2kit.building.load import load_of
from lfm2kit.building.options import Options
from lfm2kit.building.plan import AUTO
from lfm2kit.building.rates import MADE_BY, Calibration, read_calibration
from lfm2kit.checkpoint import Checkpoint
from lfm2kit.cli.console import STDOUT, progress, show_table
from lfm2kit.cli.options import files_of, open_model
from lfm2kit.cli.report import Report
from lfm2kit.cli.rewrite_options import option_of
from lfm2kit.errors import Lfm2kitError, Option
from lfm2kit.ranks.balancing import check_replicas
from lfm2kit.ranks.groups import check_ep_size
from lfm2kit.records.machine import described
from lfm2kit.simulating.comparing import Compared, Simulated, Simulation
from lfm2kit.simulating.model_rates import Found, ModelRates, found
from lfm2kit.simulating.network import network, past_host
from lfm2kit.simulating.predicting import Machine
from lfm2kit.simulating.request import Request, parsed

# Options that say nothing about what is simulated: all layouts, with whole experts on each rank.
NOT_SIMULATED = (
    "n_cpu_moe",
    "gpu_memory",
    "streamed_experts",
    "parallel",
    "overlap",
    "exchange",
    "rewrites",
)
IN_ONE_PIECE = (
    "messages are counted without overlap; tokens that travel in pieces take more of them"
)
LEFT = ("ranks", "n", "layout")
RIGHT = ("samples/s", "ms", "compute", "waiting", "exchange", "copies", "gather", "weights", "sent")


class _Rates(NamedTuple):
    """The rates that a simulation uses, and what is to be said about them."""

    name: str
    calibration: Calibration
    note: str


def simulate(text: str, options: Options, json: str | None) -> None:
    """Predict the jobs of a request, show them, and write the report."""
    _check(options)
    request, report = parsed(text), Report(json, "lfm2kit plan --simulate")
    checkpoint = open_model(options)
    report.check_apart(files_of(checkpoint, options))
    rates = _rates(options, request)
    backend, precision = _item(options)
    there = found(rates.calibration, rates.name, backend, precision)
    simulation = _simulation(checkpoint, options, request, there)
    with progress("predicting", simulation.work, "layers") as advance:
        compared = list(simulation.compared(advance))
    report.fields = {
        "model": str(checkpoint.path),
        "rates": rates.name,
        "rates_of": dict(rates.calibration.machine),
        "backend": there.backend,
        "precision": precision,
        "notes": list(_notes(rates, simulation)),
        "jobs": [_fields(one, job) for one in compared for job in one.jobs],
    }
    for one in compared:
        for job in one.jobs:
            name = f"{job.ranks} ranks, n={job.n}, {job.name}"
            report.figure(f"{name}: predicted time", "s", [job.predicted.seconds])
    if json != STDOUT:
        _show(report, compared)
    report.write()


def _notes(rates: _Rates, simulation: Simulation) -> Iterator[str]:
    """Yield what is to be said about the rates, and about what is not predicted exactly."""
    yield rates.note
    if (differing := simulation.machine.rates.differing()) is not None:
        yield differing
    if simulation.request.overlap:
        yield IN_ONE_PIECE


def _check(options: Options) -> None:
    """Raise `Lfm2kitError` for an option that a simulation would not take into account."""
    for name in NOT_SIMULATED:
        value = getattr(options, name)
        if value != Options.__dataclass_fields__[name].default:
            shown = option_of(value[0]) if name == "rewrites" else Option(name, value)
            raise Lfm2kitError(shown, ": not together with ", Option("simulate"), "; leave it out")


def _item(options: Options) -> tuple[str | None, str]:
    """Return the backend of the plan, None for whichever there are rates of, and its precision."""
    plan = options.chosen_plan()
    if plan.rules:
        raise Lfm2kitError(Option("simulate"), f": takes one backend, and the plan is {plan}")
    name, _, precision = plan.default.partition(":")
    return None if name == AUTO else name, precision or options.precision


def _rates(options: Options, request: Request) -> _Rates:
    """Return the rates in the file that is given, or those that are kept for this machine."""
    ranks = min(request.per_node, max(request.ranks))
    context = Context(options.precision, options.threads, ranks)
    if options.rates is None:
        try:
            path, calibration = read_kept(context)
        except Lfm2kitError as error:
            with_ranks = f", with --ranks {ranks}" if ranks > 1 else ""
            file = f"{with_ranks}; or give the file of a calibration, such as "
            said = Option("simulate"), f": {error}{file}", Option("rates", "rates.json")
            raise Lfm2kitError(*said) from None
        return _Rates(str(path), calibration, f"by the rates in {path}")
    calibration = read_calibration(options.rates)
    here = described(context)
    known = {name: here[name] for name in calibration.machine if name in here}
    differing = "; ".join(differences(calibration.machine, known))
    note = f"by the rates in {options.rates}"
    return _Rates(
        str(options.rates),
        calibration,
        f"{note}, which were not measured here: {differing}" if differing else note,
    )


def _simulation(
    checkpoint: Checkpoint, options: Options, request: Request, there: Found
) -> Simulation:
    load = load_of(options.load, checkpoint.spec)
    if load is not None:
        check_replicas(options.replicate_experts, load)
    copies = there.calibration.copies
    if copies is None:
        raise Lfm2kitError(f"{there.rates}: there is no rate of copies; {MADE_BY}")
    rates = ModelRates.of(checkpoint.spec, checkpoint.weights, there)
    side = rates.of_experts
    machine = Machine(
        rates,
        network(request, there.calibration, there.rates),
        copies,
        request.overlap,
        None if side is None else past_host(there.calibration, side.memory, request.per_node),
        None if side is None or side.link is None else side.link.to_host,
    )
    replicas, ep_size = options.replicate_experts, options.ep_size
    if ep_size is not None and all(ranks % ep_size for ranks in request.ranks):
        check_ep_size(ep_size, max(request.ranks))
    return Simulation(checkpoint.spec, request, machine, load, replicas, ep_size)


def _fields(compared: Compared, job: Simulated) -> dict[str, Any]:
    predicted = job.predicted
    is_best = job is compared.best
    return {
        "ranks": job.ranks,
        "n": job.n,
        "layout": job.name,
        "samples_per_second": job.samples_per_second,
        "seconds": predicted.seconds,
        "parts": predicted.parts._asdict(),
        "limit": str(predicted.limit),
        "weight_bytes": predicted.kept_bytes,
        "fits": job.fits,
        "sent_bytes": predicted.sent_bytes.tolist(),
        "sent_messages": predicted.sent_messages.tolist(),
        "rows_max_over_mean": predicted.rows_max_over_mean,
        "best": is_best,
        "why": compared.why() if is_best else None,
    }


def _show(report: Report, compared: Sequence[Compared]) -> None:
    """Print a row for each job, and which layout wins."""
    report.line(f"{report.fields['model']}: PREDICTED, {'; '.join(report.fields['notes'])}")
    report.line("ms are those of an average rank; weights and bytes sent are the most of a rank")
    show_table(
        [list(_row(job)) for one in compared for job in one.jobs],
        *(Column(heading, justify="right", no_wrap=True) for heading in LEFT[:2]),
        Column(LEFT[2], overflow="fold"),
        *(Column(heading, justify="right", no_wrap=True) for heading in RIGHT),
        Column("limit", overflow="fold"),
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for line in _winners(compared):
        report.line(line)


def _row(job: Simulated) -> Iterator[str]:
    predicted = job.predicted
    yield from (str(job.ranks), str(job.n), job.name)
    yield f"{job.samples_per_second:.4g}"
    yield f"{1e3 * predicted.seconds:.4g}"
    yield from (f"{1e3 * seconds:.3g}" for seconds in predicted.parts)
    yield size(predicted.kept_bytes) + ("" if job.fits else ", too much")
    yield size(int(predicted.sent_bytes.max()))
    yield str(predicted.limit)


def _winners(compared: Sequence[Compared]) -> Iterator[str]:
    """Yield a line for each number of ranks and samples that several layouts are possible for."""
    for one in compared:
        if len(one.jobs) > 1:
            first, best = one.jobs[0], one.best
            name = "none" if best is None else best.name
            yield f"{first.ranks} ranks, n={first.n}: {name}: {one.why()}"
