"""`lfm2kit specs`: a model as a TOML file of layer specs, to be changed and run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lfm2kit import specs as layers
from lfm2kit.building.options import Options
from lfm2kit.checkpoint.config import ModelConfig, model_spec, parse_config, read_config
from lfm2kit.checkpoint.spec_files import spec_text
from lfm2kit.checkpoint.synth import KNOWN
from lfm2kit.cli.options import open_model


def specs(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help=f"A model as --model takes it, a config.json, or one of {', '.join(KNOWN)}.",
        ),
    ],
) -> None:
    """Print a model as specs in TOML, to run by --model FILE.toml --random-inputs 16."""
    print(spec_text(described(model)), end="")


def described(model: str) -> layers.Model:
    """Return the specs of a model: as --model takes it, a config.json, or a known one."""
    if model in KNOWN:
        return _of_config(parse_config(KNOWN[model]))
    if model.endswith(".json"):
        return _of_config(read_config(Path(model)))
    return open_model(Options(model=model)).spec


def _of_config(config: ModelConfig) -> layers.Model:
    return model_spec(config, tied=config.tie_word_embeddings is not False)
