"""The files beside the weights that belong to a model: tokenizer, chat template, generation."""

from __future__ import annotations

import os
from pathlib import Path

NAMES = frozenset(
    {
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "generation_config.json",
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    }
)
TEMPLATES = "additional_chat_templates"  # a folder of .jinja files, as transformers saves them


def is_companion(name: Path) -> bool:
    """Return whether a path, relative to the model's folder, is one of these files."""
    if len(name.parts) == 2:
        return name.parts[0] == TEMPLATES and name.suffix == ".jinja"
    return str(name) in NAMES


def companions(folder: Path) -> dict[Path, Path]:
    """Return the companions in `folder`, by their paths relative to it."""
    there = [*files_in(folder), *files_in(folder / TEMPLATES)]
    named = {path.relative_to(folder): path for path in there}
    return {name: path for name, path in named.items() if is_companion(name)}


def files_in(folder: Path) -> list[Path]:
    """Return the regular files of a folder, sorted; none if it cannot be listed."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    return [folder / name for name in names if os.path.isfile(folder / name)]
