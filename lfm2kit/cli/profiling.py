"""Measures, shows and writes what `lfm2kit profile` is asked for."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Column

from lfm2kit.backend import Ceilings
from lfm2kit.batch import Batch
from lfm2kit.building.loading import Setup, set_up
from lfm2kit.building.options import Options
from lfm2kit.building.results import Checked
from lfm2kit.checkpoint import Checkpoint
from lfm2kit.cli.console import STDOUT, progress, remark, show_table, write_document
from lfm2kit.cli.report import Report
from lfm2kit.cli.rewrite_options import check_state
from lfm2kit.measuring.bench import WARM_UPS, measured_ceilings, random_batch
from lfm2kit.outputs.files import replaced
from lfm2kit.profiling.figures import Part, Total, parts_of, totals
from lfm2kit.profiling.forwards import MOST_OVERHEAD, Profile, Prompt, profiled
from lfm2kit.profiling.loads import expert_loads
from lfm2kit.profiling.page.heat import heat
from lfm2kit.profiling.page.ladder import ladder
from lfm2kit.profiling.page.page import page
from lfm2kit.profiling.page.roofline import roofline
from lfm2kit.profiling.page.strip import strip
from lfm2kit.profiling.page.timeline import timeline
from lfm2kit.profiling.trace_events import trace_events
from lfm2kit.records.machine import described, machine_of, versions
from lfm2kit.state import Room
from lfm2kit.verifying import REFERENCE
from lfm2kit.verifying.verification import Verification, verify_against

COMPARED = 4  # samples whose blocks are compared with the reference's
KIND_COLUMNS = (
    "kind", "backend", "blocks", "ms", "% of all", "GFLOP/s", "GB/s", "% of roofline",
)  # fmt: skip


class Asked(NamedTuple):
    """The sizes of what is measured."""

    n: int
    seq_len: int
    decode: bool
    repetitions: int
    loads: bool = False  # whether tokens are counted by expert
    errors: bool = False

    @property
    def test(self) -> str:
        if self.decode:
            return f"a step of {self.n} sequences after {self.seq_len} tokens"
        return f"a forward of {self.n} samples of {self.seq_len} tokens"


class Found(NamedTuple):
    """What was measured."""

    setup: Setup
    asked: Asked
    profile: Profile
    ceilings: Ceilings | None
    parts: Sequence[Part]
    loads: Mapping[int, Sequence[int]]  # tokens by layer and expert, if they were counted
    errors: Verification | None

    @property
    def totals(self) -> list[Total]:
        return list(totals(self.parts, self.ceilings))

    @property
    def inside(self) -> float:
        """Return the seconds that blocks take, which overlap where memories work side by side."""
        return sum(part.seconds for part in self.parts)


def measured(checkpoint: Checkpoint, options: Options, asked: Asked) -> Found:
    """Build the model and measure its forwards."""
    tokens = asked.n * asked.seq_len
    setup = set_up(checkpoint, options, tokens=tokens)
    if asked.decode:
        check_state("--decode", setup.rewrites)
    for note in setup.notes():
        remark(note)
    prompt = _prompt(checkpoint, asked)
    with np.errstate(all="ignore"):
        profile = _profile(setup, prompt, asked)
        loads = expert_loads(checkpoint, options, prompt) if asked.loads else {}
        errors = _errors(setup, prompt) if asked.errors else None
    parts = parts_of(setup, profile, prompt.batch)
    return Found(setup, asked, profile, measured_ceilings(setup), parts, loads, errors)


def _profile(setup: Setup, prompt: Prompt, asked: Asked) -> Profile:
    """Return the profile of a model that is built for it, and gone when this returns."""
    checked: list[Checked] = []
    model = setup.build(tokens=asked.n * asked.seq_len, checked=checked)
    total = 2 * (WARM_UPS + asked.repetitions)
    with progress("measuring", total, "forwards") as advance:
        return profiled(model, checked, prompt, asked.repetitions, lambda: advance(1))


def _errors(setup: Setup, prompt: Prompt) -> Verification:
    """Compare each block with the reference's, on the first samples of what is measured."""
    batch = prompt.batch if prompt.before is None else prompt.before
    samples = np.array(batch.token_ids).reshape(batch.sequences, -1)[:COMPARED]
    return verify_against(setup, samples, REFERENCE)


def _prompt(checkpoint: Checkpoint, asked: Asked) -> Prompt:
    size = checkpoint.spec.embed_tokens.vocab_size
    if not asked.decode:
        return Prompt(random_batch(asked.n, asked.seq_len, size, seed=0))
    n, seq_len = asked.n, asked.seq_len
    room = Room.of_sequences(n, seq_len + 1)
    pages = np.arange(room.pages, dtype=np.int32).reshape(n, -1)
    ids = np.random.default_rng(0).integers(0, size, (n, seq_len + 1), dtype=np.int32)
    before = Batch.of_sequences(list(ids[:, :-1]), pages=pages)
    step = Batch.of_sequences(list(ids[:, -1:]), starts=[seq_len] * n, pages=pages)
    return Prompt(step, before, room)


def show(report: Report, found: Found) -> None:
    """Print where the time goes: by kind of block, and by layer."""
    profile, setup = found.profile, found.setup
    milliseconds = 1e3 * profile.seconds
    report.line(f"{setup.plan}: {found.asked.test} takes {milliseconds:.4g} ms")
    if report.target != STDOUT:
        _show_kinds(found)
        _show_layers(found)
    report.line(_of_marks(profile))


def _of_marks(profile: Profile) -> str:
    where = "in all blocks" if profile.groups == 1 else "in the blocks of one layer at a time"
    limit = f" (more than {MOST_OVERHEAD:.0%})" if profile.overhead > MOST_OVERHEAD else ""
    return f"marks {where} cost {profile.overhead:.1%} of a forward{limit}"


def _show_kinds(found: Found) -> None:
    rows = [_kind_row(total, found.profile.seconds) for total in found.totals]
    rest = found.profile.seconds - found.inside
    rows.append(
        [
            "between blocks",
            "",
            "",
            f"{1e3 * rest:.4g}",
            _percent(rest / found.profile.seconds),
            "",
            "",
            "",
        ]
    )
    show_table(
        rows,
        *map(
            Column, ("kind", "backend", "blocks", "ms", "share", "GFLOP/s", "GB/s", "% of roofline")
        ),
        box=SIMPLE_HEAD,
    )


def _kind_row(total: Total, whole: float) -> list[str]:
    return [
        total.kind,
        total.backend,
        str(total.blocks),
        f"{1e3 * total.seconds:.4g}",
        _percent(total.seconds / whole),
        f"{total.work.flops / total.seconds / 1e9:.4g}",
        f"{total.work.bytes / total.seconds / 1e9:.4g}",
        "-" if total.roofline is None else _percent(total.roofline),
    ]


def _show_layers(found: Found) -> None:
    """Print a row for each layer: its parts in microseconds, in the order of the forward."""
    layers: dict[int, list[Part]] = {}
    for part in found.parts:
        if part.layer is not None:
            layers.setdefault(part.layer, []).append(part)
    show_table(
        (
            [str(layer), f"{1e6 * sum(p.seconds for p in some):.4g}", _in_words(some)]
            for layer, some in layers.items()
        ),
        *map(Column, ("layer", "us", "of which")),
        box=SIMPLE_HEAD,
    )


def _in_words(parts: Sequence[Part]) -> str:
    return ", ".join(f"{part.kind} {1e6 * part.seconds:.3g}" for part in parts)


def _percent(share: float) -> str:
    return f"{100 * share:.3g}"


def deliver(report: Report, found: Found, trace: Path | None, html: Path | None) -> None:
    """Write the document, the trace and the page that were asked for."""
    _record(report, found)
    if trace is not None:
        write_document(trace, trace_events(found.profile, found.parts))
    if html is not None:
        with replaced(html, remark) as file:
            file.write(_page(found, report).encode())
    report.write()


def _page(found: Found, report: Report) -> str:
    """Return the page with the pictures of what was measured."""
    kinds = {part.name: part.kind for part in found.parts}
    pictures = [strip(found.parts), timeline(found.profile.timeline, kinds)]
    if found.ceilings is not None:
        pictures.insert(1, roofline(found.totals, found.ceilings))
    if found.loads:
        pictures.append(heat(found.loads))
    if found.errors is not None:
        pictures.append(ladder(found.errors))
    return page(f"{found.setup.plan}: {found.asked.test}", _facts(found), pictures, report.record())


def _facts(found: Found) -> dict[str, str]:
    setup, profile = found.setup, found.profile
    return {
        "model": str(setup.checkpoint.path),
        "precision": setup.precision_of(setup.placed),
        "time": f"{1e3 * profile.seconds:.4g} ms, the median of {len(profile.plain)} forwards",
        "marks": _of_marks(profile),
        **_in_short(described(setup.context)),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def _in_short(machine: Mapping[str, str]) -> dict[str, str]:
    """Return what there is of a machine, with the versions of lfm2kit and plugins in one line."""
    others = {name: said for name, said in machine.items() if name not in versions()}
    return others | {"versions": ", ".join(f"{name} {said}" for name, said in versions().items())}


def _record(report: Report, found: Found) -> None:
    setup, profile = found.setup, found.profile
    report.machine = machine_of(setup)
    report.figure("time", "s", profile.plain, "lower")
    report.figure("time with marks", "s", profile.marked, "lower")
    report.fields = {
        "model": str(setup.checkpoint.path),
        "backend": str(setup.plan),
        "precision": setup.precision_of(setup.placed),
        "test": found.asked.test,
        "groups": profile.groups,
        "ceilings": None if found.ceilings is None else found.ceilings._asdict(),
        "expert_loads": {str(layer): list(load) for layer, load in found.loads.items()},
        "parts": [_part(part, found.ceilings) for part in found.parts],
        "kinds": [asdict(total) | {"work": total.work._asdict()} for total in found.totals],
    }


def _part(part: Part, ceilings: Ceilings | None) -> dict[str, Any]:
    work = part.work._asdict()
    return asdict(part) | {"layer": part.layer, "work": work, "roofline": part.roofline(ceilings)}
