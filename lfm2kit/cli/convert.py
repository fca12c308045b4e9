"""`lfm2kit convert`: Hugging Face folders to `model.bin` and back, or a random checkpoint."""

from __future__ import annotations

import dataclasses
import enum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from lfm2kit import bounds
from lfm2kit.building.options import About, Options
from lfm2kit.checkpoint.config import read_config
from lfm2kit.checkpoint.convert import Source, source_of, write_checkpoint
from lfm2kit.checkpoint.documents import read_json
from lfm2kit.checkpoint.place import Origin
from lfm2kit.checkpoint.synth import KNOWN, random_source
from lfm2kit.cli.console import BYTES, progress, remark
from lfm2kit.cli.options import flags, open_model, typed_path
from lfm2kit.cli.ranks import refuse_copies
from lfm2kit.errors import Lfm2kitError
from lfm2kit.formats import BF16, F16, F32, Format

SHOWN = 8  # names of files that are left behind


class StoredAs(enum.Enum):
    F32 = "F32"
    F16 = "F16"
    BF16 = "BF16"


FORMATS = {StoredAs.F32: F32, StoredAs.F16: F16, StoredAs.BF16: BF16}


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Checkpoint folder, model.bin, embedded model, or name in the Hugging Face cache.",
        ),
    ],
    target: Annotated[
        Path,
        typer.Argument(
            metavar="TARGET",
            help="A new folder, or a file ending in .bin.",
            parser=partial(typed_path, "TARGET"),
        ),
    ],
    dtype: Annotated[
        StoredAs | None,
        typer.Option(
            metavar="|".join(StoredAs.__members__),
            help="Type of the weights. \\[default: as stored]",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a target that exists.")
    ] = False,
    random: Annotated[
        bool,
        typer.Option(
            "--random",
            help=f"Write random weights; SOURCE is a config.json or one of {', '.join(KNOWN)}.",
        ),
    ] = False,
    seed: Annotated[
        int | None,
        flags("seed", About("Seed of the random weights.", "0", least=0, most=bounds.SEED)),
    ] = None,
) -> None:
    """Convert a checkpoint to the other layout, or to another type of weights."""
    refuse_copies()
    if seed is not None and not random:
        raise Lfm2kitError(f"--seed {seed} needs --random, which is not given")
    weights = _random(source, seed or 0) if random else _opened(source)
    stored = None if dtype is None else FORMATS[dtype]
    with progress("writing", _size(weights, stored, target), BYTES) as advance:
        write_checkpoint(weights, target, stored, overwrite=overwrite, note=remark, done=advance)
    remark(f"wrote {target}")
    _say_what_is_missing(weights.origin, target)


def _say_what_is_missing(origin: Origin, target: Path) -> None:
    left = origin.left_behind
    if origin.path is None or not left or target.parent.samefile(origin.path):
        return  # a model.bin in the source's own folder has everything beside it
    more = f" and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
    remark(f"not copied from {origin.path}: {', '.join(left[:SHOWN])}{more}")


def _opened(source: str) -> Source:
    checkpoint = open_model(Options(model=source))
    opened = source_of(checkpoint)
    for sentence in checkpoint.remarks:
        remark(sentence)
    return opened


def _random(source: str, seed: int) -> Source:
    if source in KNOWN:
        return random_source(KNOWN[source], seed)
    read_config(Path(source))  # refuses what cannot be run
    weights = random_source(read_json(Path(source)), seed)
    return dataclasses.replace(weights, origin=Origin(files=(Path(source),)))


def _size(source: Source, format: Format | None, target: Path) -> int:
    """Return the bytes to be written, for the progress bar."""
    fixed = F32 if target.suffix == ".bin" else format
    shapes = source.shapes.items()
    return sum((fixed or source.formats[name]).nbytes(shape) for name, shape in shapes)
