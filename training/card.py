"""Writes the model card, README.md, from the record of a training, training.json."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lfm2kit.checkpoint.documents import read_json
from lfm2kit.errors import Lfm2kitError

RECORD = "training.json"
TEMPLATE = Path(__file__).with_name("card.md")


def write(folder: Path, record: Mapping[str, Any]) -> None:
    """Write a record and its card into a checkpoint's folder."""
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    (folder / "README.md").write_text(render(record))


def add(folder: Path, **more: Any) -> None:
    """Add facts to the record in a checkpoint's folder, and write its card anew."""
    write(folder, read(folder) | more)


def read(folder: Path) -> dict[str, Any]:
    """Return the record in a checkpoint's folder; raise `Lfm2kitError` if no card comes of it."""
    record = read_json(folder / RECORD)
    try:
        render(record)
        render(record | {"candidates": [candidate(record)]})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        said = f"{type(error).__name__}: {error}"
        raise Lfm2kitError(
            f"{folder / RECORD}: this is not the record of a training ({said})"
        ) from None
    return record


def candidate(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the card of the best of several trainings says of each of them."""
    return {"command": record["command"], "bits_per_byte": record["bits_per_byte"]["all"]}


def render(record: Mapping[str, Any]) -> str:
    """Return the card of a record, in Markdown."""
    bits = record["bits_per_byte"]
    return TEMPLATE.read_text().format(
        parameters=f"{record['parameters'] / 1e6:.2f}",
        all=f"{bits['all']:.3f}",
        novels=f"{bits['held_out_novels']:.3f}",
        speeches=f"{bits['held_out_speeches']:.3f}",
        command=record["command"],
        seed=record["seed"],
        hardware=record["hardware"],
        minutes=f"{record['seconds'] / 60:.1f}",
        tokens=f"{record['tokens'] / 1e6:.1f}",
        data=_table(("part", "bytes", "tokens"), _data_rows(record["data"])),
        curve=_table(("M tokens", "training loss", "held out"), _curve_rows(record["curve"])),
        experts=_table(
            ("layer", "top load / mean", "std of the bias"),
            ((e["layer"], e["top_over_mean"], e["bias_std"]) for e in record["experts"]),
        ),
        samples="\n\n".join(f"> {' '.join(s.split())}" for s in record["samples"]),
        candidates=_candidates(record.get("candidates", ())),
        inputs=_inputs(record.get("inputs")),
    )


def _data_rows(data: Mapping[str, Any]) -> Iterable[tuple[str, str, str]]:
    for name, (nbytes, tokens) in data.items():
        yield name.replace("_", " "), f"{nbytes:,}", f"{tokens:,}"


def _curve_rows(curve: Iterable[Any]) -> Iterable[tuple[str, str, str]]:
    for tokens, loss, bits in curve:
        yield f"{tokens / 1e6:.2f}", f"{loss:.3f}", f"{bits:.3f}"


def _candidates(candidates: Sequence[Mapping[str, Any]]) -> str:
    if not candidates:
        return ""
    rows = ((_options(one["command"]), f"{one['bits_per_byte']:.4f}") for one in candidates)
    return (
        f"\nIt is the best of {len(candidates)} trainings, chosen by the figure for held-out text, "
        f"which is therefore slightly too good:\n\n{_table(('options', 'bits per byte'), rows)}\n"
    )


def _options(command: str) -> str:
    """Return a command's options without those that all trainings have."""
    _, _, options = command.partition(" --device ")
    return f"`{options.partition(' ')[2]}`"


def _inputs(inputs: Mapping[str, Any] | None) -> str:
    if inputs is None:
        return "There are none yet; `python -m training.answers` makes them."
    return (
        f"`inputs.bin` has {inputs['count']} beginnings of held-out paragraphs, {inputs['length']} "
        f"tokens each, of {inputs['candidates']} that were tried. `answers.bin` has the logits of "
        f"transformers {inputs['transformers']} in float64, stored as float32. For no token are "
        f"the scores of the last expert taken and the first one not taken closer than "
        f"{inputs['least_gap']:.1e}, so rounding cannot choose another expert (paragraphs with a "
        f"gap below {inputs['gap_rule']:.0e} were left out). The two highest logits differ by at "
        f"least {inputs['least_margin']:.1e}."
    )


def _table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    names = list(head)
    lines = [names, ["---"] * len(names), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
