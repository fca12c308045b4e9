"""Opens a GGUF file: its keys as specs, and its tensors under canonical names, without a copy.

Names are those of llama.cpp's converter, which takes them from a table of the library gguf.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

from lfm2kit.checkpoint import Checkpoint, map_file
from lfm2kit.checkpoint.config import model_spec
from lfm2kit.checkpoint.mapped import Extent, check_extents, view
from lfm2kit.errors import Lfm2kitError
from lfm2kit.specs import Model, Shape
from lfm2kit.weights import Tensor, Weights
from lfm2kit_gguf.config import ARCHITECTURE, config_of
from lfm2kit_gguf.formats import format_of
from lfm2kit_gguf.header import Header
from lfm2kit_gguf.parts import headers_of

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
EXPERT = re.compile(r"(.*\.experts)\.(\d+)(\..*)")


def open_gguf(path: Path) -> Checkpoint:
    """Open a file, or the first of several; its tensors stay views of them.

    Raise `Lfm2kitError`, which names the file, for whatever is damaged, missing or unknown.
    """
    headers = headers_of(path)
    stored = dict(_stored(path, headers))
    if EMBEDDING not in stored:
        raise Lfm2kitError(f"{path}: there is no tensor '{EMBEDDING}'")
    config = config_of(headers[0], stored[EMBEDDING].shape[0])
    spec = model_spec(config, tied=HEAD not in stored)
    names = Names(headers[0].value(ARCHITECTURE), len(spec.layers))
    tensors = _canonical(path, spec, stored, names, config.num_experts)
    return Checkpoint(path, spec, Weights(tensors), config)


def _stored(path: Path, headers: Iterable[Header]) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor by its name in the files."""
    seen = set()
    for header in headers:
        for name, tensor in _mapped(header):
            if name in seen:
                raise Lfm2kitError(f"{path}: tensor '{name}' is in two of its files")
            seen.add(name)
            yield name, tensor


def _mapped(header: Header) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of one file, as views of it."""
    path, data = header.path, map_file(header.path)
    extents = [Extent(t.name, t.data_offset, t.data_offset + t.n_bytes) for t in header.tensors]
    check_extents(path, extents, int(header.data_offset), len(data))
    for extent, tensor in zip(extents, header.tensors, strict=True):
        try:
            format = format_of(tensor.tensor_type)
        except Lfm2kitError as error:
            raise Lfm2kitError(f"{path}: tensor '{extent.name}' is of ", *error.args) from None
        shape = tuple(reversed(tensor.shape.tolist()))
        blocks = view(path, data, extent, format.block, format.blocks(shape))
        yield extent.name, Tensor(extent.name, format, shape, blocks)


class Names:
    """The names that tensors have in GGUF files of an architecture."""

    def __init__(self, architecture: str, layers: int) -> None:
        kinds = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
        kind: MODEL_ARCH = kinds[architecture]
        self._map = get_tensor_name_map(kind, layers)

    def of(self, name: str) -> str:
        """Return the stored name of the tensor that lfm2kit calls `name`.

        All experts of a layer are one tensor.
        """
        if name == "lm_head.weight":
            return HEAD
        merged = EXPERT.sub(r"\1\3", name)
        prefix = "model." if merged == name else ""  # as the converter asks its table
        if name.endswith(".expert_bias"):
            merged += ".bias"
        return self._map.get_name(prefix + merged, (".weight", ".bias")) or name


def _canonical(
    path: Path, spec: Model, stored: dict[str, Tensor], names: Names, experts: int
) -> dict[str, Tensor]:
    """Return the tensors of `spec`, and what is left over under its own name."""
    named, left = {}, dict(stored)
    for name, shape in spec.parameters().items():
        stored_name = names.of(name)
        if stored_name not in stored:
            raise Lfm2kitError(f"{path}: there is no tensor '{stored_name}'")
        left.pop(stored_name, None)
        tensor, expert = stored[stored_name], EXPERT.fullmatch(name)
        if expert is not None:
            tensor = _expert(path, tensor, int(expert[2]), experts)
        named[name] = replace(_formed(tensor, shape), name=name)
    return named | left


def _expert(path: Path, tensor: Tensor, number: int, experts: int) -> Tensor:
    """Return one expert's matrix of the tensor that has those of a layer."""
    if len(tensor.shape) != 3 or tensor.shape[0] != experts:
        raise Lfm2kitError(
            f"{path}: tensor '{tensor.name}' has shape {list(tensor.shape)}; "
            f"expected [{experts}, rows, columns]"
        )
    return tensor[number]


def _formed(tensor: Tensor, shape: Shape) -> Tensor:
    """Return a ShortConv's filter in its three dimensions, of which llama.cpp leaves out one."""
    is_filter = len(shape) == 3 and tensor.shape == (shape[0], shape[2])
    if not is_filter:
        return tensor
    data: Any = tensor.data[:, None]
    return replace(tensor, shape=shape, data=data)
