"""`lfm2kit warmup`: has the backends compile their kernels now, so that no run waits for it."""

from __future__ import annotations

import time
from typing import Annotated

from lfm2kit.building.loading import set_up
from lfm2kit.building.options import Options
from lfm2kit.cli.console import Report, remark
from lfm2kit.cli.options import JsonOption, Without, files_of, open_model, spread
from lfm2kit.measuring.bench import random_batch


@spread
def warmup(options: Annotated[Options, Without(("seed",))], json: JsonOption = None) -> None:
    """Compile the kernels that a plan needs, so that later runs start faster."""
    report = Report(json)
    start = time.perf_counter()
    checkpoint = open_model(options)
    report.check_apart(files_of(checkpoint, options))
    setup = set_up(checkpoint, options)
    for note in setup.notes():
        remark(note)
    built = setup.build()
    built.logits(random_batch(1, 2, built.spec.embed_tokens.vocab_size, seed=0))
    seconds = time.perf_counter() - start
    report.line(f"{setup.plan}: ready after {seconds:.1f} s")
    report.fields = {
        "backend": str(setup.plan),
        "precision": setup.precision_of(setup.placed),
        "seconds": seconds,
    }
    report.write()
