"""Decides where a converted checkpoint may be written, so that no file is lost."""

from __future__ import annotations

import filecmp
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lfm2kit.checkpoint import Checkpoint
from lfm2kit.checkpoint.companions import TEMPLATES, companions, files_in
from lfm2kit.checkpoint.model_bin import read_model_bin
from lfm2kit.checkpoint.names import CONFIG, INDEX
from lfm2kit.errors import Lfm2kitError, Option
from lfm2kit.outputs.folders import remove_leftovers_of_folder
from lfm2kit.outputs.targets import identity

ANYONES_WEIGHTS = re.compile(r".*\.safetensors|pytorch_model.*\.bin")
OUR_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")


@dataclass(frozen=True, slots=True)
class Origin:
    """The files that a source is made from; without any, it is random."""

    path: Path | None = None  # of the checkpoint
    files: tuple[Path, ...] = ()  # every one that is read
    weights: tuple[Path, ...] = ()  # of these, the ones with tensors
    companions: Mapping[Path, Path] = field(default_factory=dict)  # go along, under these names
    left_behind: tuple[str, ...] = ()  # what else is in the checkpoint's folder

    def is_at(self, target: Path) -> bool:
        """Return whether the checkpoint is to be rewritten in its own place."""
        return self.path is not None and os.path.realpath(self.path) == str(target)


def origin_of(checkpoint: Checkpoint) -> Origin:
    """Return where a checkpoint that was opened comes from."""
    weights = tuple(checkpoint.weight_files())
    kept = companions(checkpoint.folder)
    files = tuple(checkpoint.files())
    return Origin(checkpoint.path, files, weights, kept, tuple(_others(checkpoint, weights, kept)))


def _others(
    checkpoint: Checkpoint, weights: tuple[Path, ...], kept: Mapping[Path, Path]
) -> Iterator[str]:
    """Yield the visible entries of a checkpoint's folder that are neither read nor copied."""
    if not checkpoint.path.is_dir():
        return  # what lies beside a single file need not belong to it
    taken = {identity(path) for path in weights}
    names = {CONFIG, INDEX, *(name.parts[0] for name in kept)}
    for name in sorted(os.listdir(checkpoint.folder)):
        is_taken = name in names or identity(checkpoint.folder / name) in taken
        if not is_taken and not name.startswith("."):
            yield name


def check_place(
    target: Path, origin: Origin, *, overwrite: bool, staged: Path | None = None
) -> None:
    """Raise `Lfm2kitError` if writing a folder or a model.bin would lose another file.

    `staged` is the new folder, which may lie in the old one, once it is complete.
    """
    is_bin = target.suffix == ".bin"
    if not target.parent.is_dir():
        raise Lfm2kitError(f"{target}: there is no folder {target.parent}")
    remove_leftovers_of_folder(target)
    if not os.path.exists(target):
        return
    if not overwrite:
        raise Lfm2kitError(
            f"{target} already exists; give ", Option("overwrite", True), " to replace it"
        )
    if is_bin == target.is_dir():
        raise Lfm2kitError(f"{target} is a {'folder' if is_bin else 'file'}; remove it yourself")
    if is_bin:
        _check_bin(target, origin)
    else:
        _check_folder(target, origin, staged)


def _check_bin(target: Path, origin: Origin) -> None:
    """Refuse a model.bin that would replace a file of its source, except that model.bin itself."""
    if not origin.is_at(target) and identity(target) in map(identity, origin.files):
        raise Lfm2kitError(f"{target}: the source is read from this file; give another name")
    if os.path.getsize(target):
        try:
            read_model_bin(target)
        except Lfm2kitError as error:
            raise Lfm2kitError(f"{error}; move this file away, or give another name") from None


def _check_folder(target: Path, origin: Origin, staged: Path | None) -> None:
    """Refuse to replace a folder if it holds a file that the new one lacks."""
    own = {identity(path) for path in origin.weights} if origin.is_at(target) else set()
    for path in target.rglob("*"):
        name = path.relative_to(target)
        is_new = staged is not None and path.is_relative_to(staged)
        if is_new or (path.is_dir() and str(name) == TEMPLATES):
            continue
        is_weights = bool(OUR_WEIGHTS.fullmatch(str(name))) or identity(path) in own
        is_replaced = str(name) in (CONFIG, INDEX) or name in origin.companions
        if path.is_dir() or not (is_weights or is_replaced):
            raise Lfm2kitError(
                f"{target} holds '{name}', which the new checkpoint does not have; "
                "move it away first"
            )


def other_beside(target: Path) -> Path | None:
    """Return another model's weights in the folder of a model.bin; both share what is beside them.

    A folder has one config.json and one tokenizer for all of them.
    """
    own = identity(target)
    others = (path for path in files_in(target.parent) if identity(path) != own)
    return next((path for path in others if _has_weights(path)), None)


def _has_weights(path: Path) -> bool:
    if ANYONES_WEIGHTS.fullmatch(path.name):
        return True
    try:
        return path.suffix == ".bin" and bool(read_model_bin(path))
    except Lfm2kitError:  # samples, for example
        return False


def companions_beside(
    target: Path, origin: Origin, *, overwrite: bool
) -> Iterator[tuple[Path, Path]]:
    """Yield the companions to be copied beside a model.bin, each with its new path.

    Raise `Lfm2kitError` where a file of another model has that name: with `overwrite` only if that
    model's weights are there, too.
    """
    for name, path in origin.companions.items():
        new = target.parent / name
        if os.path.exists(new):
            if identity(new) == identity(path) or filecmp.cmp(path, new, shallow=False):
                continue
            if not overwrite:
                raise Lfm2kitError(
                    f"{new} is another model's; give ",
                    Option("overwrite", True),
                    " or another folder",
                )
            if (other := other_beside(target)) is not None:
                raise Lfm2kitError(f"{new} is {other.name}'s as well; give another folder")
        yield path, new
