"""How a checkpoint wants its tokens chosen, from its generation_config.json."""

from __future__ import annotations

import os
from pathlib import Path
from reprlib import repr as brief  # of what a file says, however long it is
from typing import Any, NamedTuple

from lfm2kit import bounds
from lfm2kit.checkpoint.documents import read_json
from lfm2kit.engine.sampling import Sampling
from lfm2kit.errors import Lfm2kitError

NAME = "generation_config.json"
FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
LARGEST_ID = bounds.LARGEST["vocab_size"] - 1


class GenerationConfig(NamedTuple):
    """The defaults of a checkpoint."""

    sampling: Sampling = Sampling()
    eos_ids: tuple[int, ...] = ()  # each of them ends a text


def read_generation_config(folder: Path) -> GenerationConfig:
    """Return what the generation_config.json in `folder` says; the defaults if there is not one.

    Raise `Lfm2kitError` if it cannot be read, or a value is out of range.  Keys that it leaves out,
    or sets to null, keep the defaults of `Sampling`, and unknown keys are ignored.  Where it has no
    eos ids, those of config.json count.
    """
    path, config = folder / NAME, folder / "config.json"
    fields = _fields(path)
    eos_ids = _eos_ids(path, fields) or _eos_ids(config, _fields(config))
    return GenerationConfig(_sampling(path, fields), eos_ids)


def _fields(path: Path) -> dict[str, Any]:
    """Return the fields of a file; none if there is not one, but a broken link is an error."""
    return read_json(path) if os.path.lexists(path) else {}


def _sampling(path: Path, fields: dict[str, Any]) -> Sampling:
    given = {name: fields[name] for name in FIELDS if fields.get(name) is not None}
    do_sample = fields.get("do_sample")
    if do_sample is not None and not isinstance(do_sample, bool):
        raise Lfm2kitError(f"{path}: do_sample is {brief(do_sample)}; expected true or false")
    try:
        sampling = Sampling(**given)
        if do_sample is False:
            return Sampling(temperature=0, repetition_penalty=sampling.repetition_penalty)
        return sampling
    except Lfm2kitError as error:
        raise Lfm2kitError(f"{path}: {error}") from None


def _eos_ids(path: Path, fields: dict[str, Any]) -> tuple[int, ...]:
    """Return each id once, in the order of the file."""
    value = fields.get("eos_token_id")
    ids = value if isinstance(value, list) else [value] if value is not None else []
    for one in ids:
        if isinstance(one, bool) or not isinstance(one, int) or not 0 <= one <= LARGEST_ID:
            expected = f"a token id from 0 to {LARGEST_ID}, or a list of such ids"
            raise Lfm2kitError(f"{path}: eos_token_id is {brief(value)}; expected {expected}")
    return tuple(dict.fromkeys(ids))
