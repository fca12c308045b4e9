"""`lfm2kit warmup`: has the backends compile their kernels now, so that no run waits for it."""

from __future__ import annotations

import time
from functools import partial
from typing import Annotated

from lfm2kit.building.loading import Setup, set_up
from lfm2kit.building.options import Options
from lfm2kit.cli.console import remark
from lfm2kit.cli.options import (
    IndependentOption,
    JsonOption,
    RanksOption,
    TransportOption,
    Without,
    files_of,
    open_model,
    spread,
)
from lfm2kit.cli.preparing import check_same_file, place_of, shared_paths
from lfm2kit.cli.ranks import (
    agreed,
    check_independent,
    check_size,
    ending_all_ranks,
    facts_of_setup,
    joined_job,
    leave_to_ranks,
    refuse_options,
)
from lfm2kit.cli.report import Report
from lfm2kit.measuring.bench import random_batch
from lfm2kit.ranks.joining import settled_alike
from lfm2kit.ranks.launchers import DEFAULT_TRANSPORT
from lfm2kit.records.machine import machine_of
from lfm2kit.transport import Transport


@partial(spread, refused=refuse_options)
def warmup(
    options: Annotated[Options, Without(("seed", "check"))],
    ranks: RanksOption = None,
    transport: TransportOption = DEFAULT_TRANSPORT,
    independent: IndependentOption = False,
    json: JsonOption = None,
) -> None:
    """Compile the kernels that a plan needs, so that later runs start faster."""
    start = time.perf_counter()
    check_independent(ranks, independent)
    job = None if independent else joined_job(transport)
    is_first = job is None or job.world.rank == 0
    report = Report(json if is_first else None, "lfm2kit warmup")
    with ending_all_ranks(job):
        # On each machine one rank compiles a kernel, while the others wait for it.
        prepare = partial(_prepared, options, json, report, job, ranks)
        setup = agreed(job, prepare, facts_of_setup)
        leave_to_ranks(job, transport, ranks)
        if job is not None:
            setup = settled_alike(job, setup)
        for note in setup.notes() if is_first else ():
            remark(note)
        built = setup.build()
        built.logits(random_batch(1, 2, built.spec.embed_tokens.vocab_size, seed=0))
        if job is not None:
            job.barrier()
        if is_first:
            _conclude(setup, time.perf_counter() - start, report)


def _prepared(
    options: Options,
    json: str | None,
    report: Report,
    job: Transport | None,
    ranks: int | None,
) -> Setup:
    check_size(job, ranks)
    if job is not None or (ranks or 1) > 1:
        check_same_file(shared_paths(options, json))
    checkpoint = open_model(options)
    report.check_apart(files_of(checkpoint, options))
    return set_up(checkpoint, options, world=place_of(job, ranks), transport=job)


def _conclude(setup: Setup, seconds: float, report: Report) -> None:
    ranks = setup.world.size
    on = f" on {ranks} ranks" if ranks > 1 else ""
    report.line(f"{setup.plan}: ready{on} after {seconds:.1f} s")
    report.fields = {
        "backend": str(setup.plan),
        "precision": setup.precision_of(setup.placed),
        "ranks": ranks,
    }
    report.machine = machine_of(setup)
    report.figure("time", "s", [seconds], "lower")
    report.write()
