"""Opens checkpoints: finds the description and the tensors, and checks the one against the other.

Nothing is read but headers; the tensors are views of memory maps.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as brief  # of what a plugin returned, however long it is
from typing import TYPE_CHECKING

import numpy as np

from lfm2kit import specs
from lfm2kit.checkpoint import mapped
from lfm2kit.checkpoint.companions import companions, files_in, is_companion
from lfm2kit.checkpoint.config import LFM2_8B_A1B, ModelConfig, model_spec, read_config
from lfm2kit.checkpoint.file_kinds import is_safetensors
from lfm2kit.checkpoint.foreign import check_model, check_names
from lfm2kit.checkpoint.huggingface import canonical, read_folder
from lfm2kit.checkpoint.mapped import map_file
from lfm2kit.checkpoint.model_bin import read_model_bin
from lfm2kit.checkpoint.names import (
    CONFIG,
    EMBEDDING,
    HEAD,
    INPUTS,
    MODEL_BIN,
    SPEC_SUFFIX,
    SPECS,
    WEIGHTS,
)
from lfm2kit.checkpoint.plugged import check_opened, reader_of
from lfm2kit.checkpoint.random_weights import RandomTensors, without_values
from lfm2kit.checkpoint.safetensors import read_safetensors, write_safetensors
from lfm2kit.checkpoint.spec_files import read_spec
from lfm2kit.checkpoint.unread import remarks_on
from lfm2kit.errors import LEAVE_OUT, Lfm2kitError, choices
from lfm2kit.specs import Spec
from lfm2kit.weights import Tensor, Weights

if TYPE_CHECKING:
    from lfm2kit.building.plugins import InstalledReader

__all__ = [
    "Checkpoint",
    "canonical",
    "check_no_part",
    "map_file",
    "open_checkpoint",
    "read_safetensors",
    "write_safetensors",
]

ROWS_AT_ONCE = 4096  # of a head compared with the embedding: a few MB at a time


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model's description and weights, found to fit each other."""

    path: Path
    spec: specs.Model
    weights: Weights  # by canonical name: Hugging Face's without `model.`
    config: ModelConfig | None  # None where specs describe the model
    remarks: tuple[str, ...] = ()  # what its user should know: two sets of weights, a stale index
    seed: int | None = None  # of random weights; None: they are read from files

    @property
    def values(self) -> Weights:
        """Return the weights with their values; those in `weights` are NaN if they are random."""
        if self.seed is None:
            return self.weights
        return Weights(RandomTensors(self.spec.parameters(), self.seed))

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    def tensors_of(self, scope: str, spec: Spec) -> list[Tensor]:
        """Return the tensors of a block of `spec` whose names begin with `scope`."""
        weights = self.weights.scope(scope)
        return [weights[name] for name in spec.parameters()]

    def prefetch(self, scope: str, spec: Spec) -> None:
        """Begin to read a block's tensors, which are used next."""
        for tensor in self.tensors_of(scope, spec):
            for array in tensor.arrays:
                mapped.prefetch(array)

    def release(self, scope: str, spec: Spec) -> None:
        """Give back the memory that reading a block's tensors took."""
        for tensor in self.tensors_of(scope, spec):
            for array in tensor.arrays:
                mapped.release(array)

    def files(self) -> list[Path]:
        """Return the files that the model is read from, and its other files beside them."""
        own = [self.path] if self.path.is_file() else []
        parts = [path for path in files_in(self.folder) if is_part(path)]
        files = [*self.weight_files(), *own, *parts, *companions(self.folder).values()]
        return list(dict.fromkeys(files))

    def weight_files(self) -> list[Path]:
        """Return the files that the tensors are mapped from, links resolved."""
        return mapped.files_of(a for tensor in self.weights.values() for a in tensor.arrays)

    def files_of(self, scope: str, spec: Spec) -> mapped.Files:
        """Return the files that contain a block's tensors."""
        return mapped.Files(a for tensor in self.tensors_of(scope, spec) for a in tensor.arrays)

    def beside(self, name: str) -> Path:
        """Return the file `name` beside the model, or in `data/` there, as in the assignment."""
        in_data = self.folder / "data" / name
        return in_data if in_data.exists() else self.folder / name

    def passed_over(self, name: str) -> Path | None:
        """Return the file `name` beside the model if another one in `data/` overrides it."""
        chosen, other = self.beside(name), self.folder / name
        return other if other.exists() and not other.samefile(chosen) else None


def is_part(path: Path) -> bool:
    """Return whether a file has the name of a checkpoint's part."""
    named = path.name in (CONFIG, SPECS, MODEL_BIN, INPUTS) or is_companion(Path(path.name))
    return named or ".safetensors" in path.name


def check_no_part(option: str, path: Path) -> None:
    """Raise `Lfm2kitError` if `path` has the name of a checkpoint's part, or contains tensors.

    So models that this command does not read are protected, too, and a new file is never taken for
    one; `lfm2kit.outputs.targets` compares files.
    """
    if any(map(is_part, (path, path.resolve()))):
        raise Lfm2kitError(f"{option} {path}: a checkpoint's file is called so; give another name")
    if _has_tensors(path):
        raise Lfm2kitError(f"{option} {path}: this file contains tensors; give another name")


def _has_tensors(path: Path) -> bool:
    try:
        if not os.path.isfile(path) or not os.path.getsize(path):  # never open those of /proc
            return False
        return is_safetensors(path) or bool(read_model_bin(path))
    except (OSError, Lfm2kitError):
        return False


def open_checkpoint(
    path: Path, readers: Iterable[InstalledReader] = (), *, seed: int = 0
) -> Checkpoint:
    """Open a folder with config.json (or model.toml), a .safetensors file, or a model.bin.

    A TOML file of specs has its tensors beside it; if there are none, they are random, by `seed`.
    Other paths are opened by the one of `readers` that takes them.  Raise `Lfm2kitError` naming
    file, tensor and cause where anything is missing, left over, misshapen, truncated or untrue,
    and where a reader takes what lfm2kit reads itself.
    """
    if (reader := reader_of(path, readers)) is None:
        return _open_own(path, seed)
    if _is_own(path):
        raise Lfm2kitError(f"{path}: {reader} takes it, but lfm2kit reads it itself; {LEAVE_OUT}")
    checkpoint = reader.open(path)
    if not isinstance(checkpoint, Checkpoint):
        raise Lfm2kitError(f"{path}: {reader} returned {brief(checkpoint)}, not a Checkpoint")
    check_opened(f"{path}: {reader}", checkpoint)
    _check_tensors(path, checkpoint.spec.parameters(), checkpoint.weights)
    return checkpoint


def _is_own(path: Path) -> bool:
    """Return whether lfm2kit reads `path` without any plugin."""
    try:
        _open_own(path, seed=0)
    except Lfm2kitError:
        return False
    return True


def _open_own(path: Path, seed: int) -> Checkpoint:
    check_model(path)
    if path.suffix == SPEC_SUFFIX:
        return _open_specs(path, seed)
    folder = path if path.is_dir() else path.parent
    config = _read_config(path, folder)
    tensors = _read_tensors(path)
    remarks = tuple(remarks_on(path, tensors)) if path.is_dir() else ()
    return _fitted(path, _spec(folder, config, tensors), tensors, config, remarks)


def _open_specs(path: Path, seed: int) -> Checkpoint:
    """Open the model that a TOML file of specs describes, whatever else describes the weights."""
    spec = read_spec(path)
    beside = next((name for name in WEIGHTS if os.path.lexists(path.parent / name)), None)
    if beside is not None:
        remarks = tuple(remarks_on(path.parent, tensors := _read_tensors(path.parent)))
        try:
            return _fitted(path, spec, tensors, None, remarks)
        except Lfm2kitError as error:
            raise Lfm2kitError(
                f"{error}; the tensors are those of {path.parent / beside}: for random weights, "
                f"move {path.name} into another folder"
            ) from None
    remark = f"{path}: there are no weights beside it, so they are random"
    weights = Weights(without_values(spec.parameters()))
    return Checkpoint(path, spec, weights, None, (remark,), seed)


def _fitted(
    path: Path,
    spec: specs.Model,
    tensors: dict[str, Tensor],
    config: ModelConfig | None,
    remarks: tuple[str, ...],
) -> Checkpoint:
    """Return the checkpoint if the tensors are those of `spec`."""
    twin = tensors.pop(HEAD, None) if spec.tie_word_embeddings else None
    check_names(path, tensors)
    _check_tensors(path, spec.parameters(), tensors)
    if twin is not None and not _equal(twin, tensors[EMBEDDING]):
        raise Lfm2kitError(f"{path}: word embeddings are tied, but '{HEAD}' differs from them")
    return Checkpoint(path, spec, Weights(tensors), config, remarks)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if path.is_dir():
        first = next((name for name in WEIGHTS if os.path.lexists(path / name)), None)
        return read_model_bin(path / MODEL_BIN) if first == MODEL_BIN else read_folder(path)
    if path.suffix == ".safetensors":
        return canonical(path, read_safetensors(path))
    return read_model_bin(path)


def _read_config(path: Path, folder: Path) -> ModelConfig | None:
    """Return the config beside the tensors; None if model.toml describes the model instead."""
    if os.path.lexists(folder / CONFIG):  # a link to nowhere counts: the reader says so
        return read_config(folder / CONFIG)
    if os.path.lexists(folder / SPECS):
        return None
    if path.suffix == ".safetensors" or not (path.is_file() or (path / MODEL_BIN).exists()):
        raise Lfm2kitError(f"{folder}: there is neither {CONFIG} nor {SPECS}")
    return LFM2_8B_A1B  # a model.bin alone: the assignment's model, or the shapes will tell


def _spec(folder: Path, config: ModelConfig | None, tensors: Mapping[str, Tensor]) -> specs.Model:
    """Return the model that the folder describes; two descriptions must agree."""
    if config is None:
        return read_spec(folder / SPECS)
    stated = config.tie_word_embeddings
    spec = model_spec(config, tied=HEAD not in tensors if stated is None else stated)
    if os.path.lexists(folder / SPECS) and read_spec(folder / SPECS) != spec:
        raise Lfm2kitError(f"{folder}: {CONFIG} and {SPECS} describe two models; remove one")
    return spec


def _equal(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have equal values, whatever their types."""
    return a.shape == b.shape and all(
        np.array_equal(a[i : i + ROWS_AT_ONCE].float32(), b[i : i + ROWS_AT_ONCE].float32())
        for i in range(0, a.shape[0], ROWS_AT_ONCE)
    )


def _check_tensors(
    path: Path, expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]
) -> None:
    for name, shape in expected.items():
        if name not in tensors:
            others = [other for other in tensors if other not in expected]
            hint = choices(name, others) if 0 < len(others) <= 5 else "truncated download?"
            raise Lfm2kitError(f"{path}: there is no tensor '{name}' ({hint})")
        if tensors[name].shape != shape:
            raise Lfm2kitError(
                f"{path}: tensor '{name}' has shape {list(tensors[name].shape)}, "
                f"but the model needs {list(shape)}"
            )
    extra = [name for name in tensors if name not in expected]
    if extra:
        more = f" and {len(extra) - 3} more" if len(extra) > 3 else ""
        raise Lfm2kitError(
            f"{path}: the model has no place for tensor {', '.join(extra[:3])}{more}"
        )
