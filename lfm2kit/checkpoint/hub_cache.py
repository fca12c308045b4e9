"""Finds models in the Hugging Face hub's cache on this machine.  Nothing is ever downloaded.

models--ORG--NAME/refs/main             the commit that `main` was when it was downloaded
models--ORG--NAME/snapshots/COMMIT/     its files, as links to models--ORG--NAME/blobs/
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from lfm2kit.checkpoint.huggingface import read_index
from lfm2kit.checkpoint.names import CONFIG, INDEX, SINGLE
from lfm2kit.errors import Lfm2kitError

# The hub's rules for ORG/NAME: so two names never share a folder, and no name leads elsewhere.
PART = r"\w(?:[\w.-]{0,94}\w)?"
NAME = re.compile(rf"(?!.*(?:--|\.\.)){PART}/{PART}", re.ASCII)
MODELS, SNAPSHOTS = "models--", "snapshots"
TEXTS = ("", ".json", ".jinja", ".md", ".model", ".txt")  # the endings of files without weights


def cache_folder() -> Path:
    """Return where the hub's own library keeps its cache, by the same variables."""
    own = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or os.path.join(caches, "huggingface")
    return Path(os.path.expandvars(os.path.expanduser(own or os.path.join(home, "hub"))))


def find_cached(name: str) -> Path | None:
    """Return the folder of the snapshot that a model's name, ORG/NAME, means in the cache.

    None if it is not the name of a model, or the cache has no such model.  Raise `Lfm2kitError` if
    the cache has only a part of it.
    """
    if NAME.fullmatch(name) is None:
        return None
    model = cache_folder() / f"{MODELS}{name.replace('/', '--')}"
    if not os.path.isdir(model):
        return None
    try:
        snapshot = main_snapshot(model)
        lacks = (
            "refs/main with its snapshot" if snapshot is None else next(_missing(snapshot), None)
        )
    except OSError as error:
        raise Lfm2kitError(f"{error.filename}: {error.strerror}") from None
    if lacks is not None:
        raise Lfm2kitError(
            f"the hub's cache has only a part of '{name}': there is no {lacks} in "
            f"{snapshot or model}, and lfm2kit downloads nothing; type '{to_download(name)}'"
        )
    return snapshot


def name_of(snapshot: Path) -> str | None:
    """Return the name of the model of which a folder is a snapshot in a cache; None if of none."""
    folder = Path(os.path.abspath(snapshot)).parent
    name = folder.parent.name.removeprefix(MODELS).replace("--", "/")
    is_in_cache = folder.name == SNAPSHOTS and folder.parent.name.startswith(MODELS)
    return name if is_in_cache and NAME.fullmatch(name) else None


def to_download(name: str) -> str:
    """Return the command that downloads a model, or the rest of it, into the cache."""
    return f"hf download {name}"


def main_snapshot(model: Path) -> Path | None:
    """Return the snapshot that `main` is, of a model's folder in the cache; None without one."""
    commits, main = snapshots(model), model / "refs" / "main"
    if not os.path.isfile(main):  # a pipe would block
        return None
    with open(main, encoding="utf-8", errors="replace") as file:
        commit = file.read(100).strip()
    return model / SNAPSHOTS / commit if commit in commits else None


def snapshots(model: Path) -> list[str]:
    """Return the commits of which a model's folder in the cache has a snapshot, sorted."""
    folder = model / SNAPSHOTS
    return sorted(os.listdir(folder)) if os.path.isdir(folder) else []


def _missing(snapshot: Path) -> Iterator[str]:
    """Yield the names of files that a snapshot lacks, as far as the snapshot itself says so.

    A download that broke off, or of single files, leaves such a snapshot.
    """
    names = sorted(os.listdir(snapshot))
    yield from (name for name in names if not os.path.exists(snapshot / name))
    if SINGLE not in names and INDEX in names:
        shards = sorted(set(read_index(snapshot / INDEX)["weight_map"].values()))
        yield from (shard for shard in shards if shard not in names)
    elif all(Path(name).suffix in TEXTS for name in names):
        yield SINGLE
    if CONFIG not in names and (SINGLE in names or INDEX in names):
        yield CONFIG
