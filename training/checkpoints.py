"""Networks to checkpoints that lfm2kit loads, and back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lfm2kit.checkpoint import open_checkpoint
from lfm2kit.checkpoint.config import model_spec, parse_config
from lfm2kit.checkpoint.convert import Source, write_checkpoint
from lfm2kit.checkpoint.place import Origin, check_place
from lfm2kit.errors import Lfm2kitError
from lfm2kit.formats import F32, Format
from lfm2kit.weights import Tensor
from training.network import Network

Arrays = Mapping[str, npt.NDArray[np.float32]]
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def write_network(
    network: Network, config: Mapping[str, Any], target: Path, data: Path | None, dtype: Format
) -> None:
    """Write a network as a Hugging Face folder, with the tokenizer's files in `data`, if any.

    Matrices are rounded to `dtype`; the routers' biases stay float32.
    """
    arrays = arrays_of(network)
    shapes = model_spec(parse_config(config), tied=True).parameters()

    def values(name: str, begin: int, end: int) -> Tensor:
        return Tensor.of_array(name, arrays[name].reshape(-1)[begin:end])

    source = Source(config, shapes, dict.fromkeys(shapes, F32), values, _origin(data))
    write_checkpoint(source, target, dtype, overwrite=True)


def check_target(target: Path, data: Path) -> None:
    """Raise `Lfm2kitError` if `write_network` could not write to `target`, before any training."""
    if missing := [name for name in COMPANIONS if not (data / name).exists()]:
        raise Lfm2kitError(f"{data}: there is no {missing[0]}; make it with training.prepare")
    check_place(Path(os.path.realpath(target)), _origin(data), overwrite=True)


def _origin(data: Path | None) -> Origin:
    return Origin(companions={} if data is None else {Path(n): data / n for n in COMPANIONS})


def arrays_of(network: Network) -> Arrays:
    """Return a network's weights by the checkpoint's names, each expert apart."""
    arrays: dict[str, npt.NDArray[np.float32]] = {}
    for name, tensor in network.state_dict().items():
        array = tensor.detach().float().cpu().numpy()
        stack, _, matrix = name.rpartition(".experts.")
        if stack:
            arrays |= {f"{stack}.experts.{e}.{matrix}.weight": w for e, w in enumerate(array)}
        else:
            arrays[name] = array
    return arrays


def read_network(folder: Path) -> Network:
    """Return the network of a checkpoint with a config.json and a tied embedding, in float32."""
    checkpoint = open_checkpoint(folder)
    if checkpoint.config is None:
        raise Lfm2kitError(f"{folder}: it has no config.json")
    network = Network(checkpoint.config)
    weights = checkpoint.weights
    state = {}
    for name, there in network.state_dict().items():
        stack, _, matrix = name.rpartition(".experts.")
        names = (
            [f"{stack}.experts.{e}.{matrix}.weight" for e in range(len(there))] if stack else [name]
        )
        values = np.stack([weights[n].float32() for n in names])
        state[name] = torch.tensor(values).reshape(there.shape)
    network.load_state_dict(state)
    return network
