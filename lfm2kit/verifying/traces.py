"""A trace: what came out of each layer of a model in one forward, in a file of NumPy arrays.

    token_ids      integers [n, seq_len]: the samples
    embed_tokens   float32 [n * seq_len, hidden_size]
    layers.0, ...  the same, after each layer: what transformers calls hidden_states[i + 1] (but for
                   the last layer, whose output it norms)
    logits         float32 [n, vocab_size], of the last tokens

A program that knows nothing of lfm2kit writes one with `numpy.savez`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lfm2kit import specs
from lfm2kit.checkpoint.file_kinds import check_regular
from lfm2kit.errors import Lfm2kitError
from lfm2kit.outputs.files import replaced

ENDING = ".npz"
IDS, EMBEDDED, LOGITS = "token_ids", "embed_tokens", "logits"
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Trace:
    """A trace that fits a model."""

    token_ids: npt.NDArray[np.int32]  # [n, seq_len]
    embedded: Float32
    layers: Mapping[int, Float32]
    logits: Float32


def write_trace(path: Path, trace: Trace) -> None:
    """Write a trace; a reader sees the old file or the whole new one."""
    arrays: dict[str, Any] = {f"layers.{i}": rows for i, rows in trace.layers.items()}
    arrays |= {IDS: trace.token_ids, EMBEDDED: trace.embedded, LOGITS: trace.logits}
    with replaced(path) as file:
        np.savez(file, **arrays)


def read_trace(path: Path, model: specs.Model) -> Trace:
    """Return the trace in a file; raise `Lfm2kitError` unless it is one, and fits `model`."""
    arrays = _arrays(path)
    vocab_size, hidden_size = model.embed_tokens.vocab_size, model.embed_tokens.hidden_size
    ids = _array(path, arrays, IDS)
    if ids.ndim != 2 or ids.size == 0 or ids.dtype.kind not in "iu":
        raise Lfm2kitError(f"{path}: '{IDS}' is {_form(ids)}; expected integers [n, seq_len]")
    if ids.min() < 0 or ids.max() >= vocab_size:
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise Lfm2kitError(f"{path}: token id {wrong}; the model's are from 0 to {vocab_size - 1}")
    rows, layers = (ids.size, hidden_size), [f"layers.{i}" for i in range(len(model.layers))]
    if unknown := arrays.keys() - {IDS, EMBEDDED, LOGITS, *layers}:
        known = f"the model has {len(layers)} layers"
        raise Lfm2kitError(f"{path}: '{min(unknown)}' is not of this model's trace; {known}")
    return Trace(
        ids.astype(np.int32),
        _floats(path, arrays, EMBEDDED, rows),
        {i: _floats(path, arrays, f"layers.{i}", rows) for i in range(len(model.layers))},
        _floats(path, arrays, LOGITS, (len(ids), vocab_size)),
    )


def _arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    check_regular(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:  # NumPy's reader, and those below it, raise what they like
        said = " ".join(str(error).split())
        raise Lfm2kitError(f"{path}: not a file of NumPy arrays ({said[:200]})") from None


def _array(path: Path, arrays: Mapping[str, Any], name: str) -> npt.NDArray[Any]:
    if name not in arrays:
        raise Lfm2kitError(f"{path}: there is no array '{name}', which a trace of this model has")
    return np.asarray(arrays[name])


def _floats(path: Path, arrays: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> Float32:
    array = _array(path, arrays, name)
    if array.shape != shape or array.dtype.kind != "f":
        raise Lfm2kitError(
            f"{path}: '{name}' is {_form(array)}; the model's is floats {list(shape)}"
        )
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(array, np.float32)
    if not np.isfinite(values).all():
        raise Lfm2kitError(f"{path}: '{name}' holds NaN or infinities, beside which nothing shows")
    return values


def _form(array: npt.NDArray[Any]) -> str:
    return f"{array.dtype} {list(array.shape)}"
