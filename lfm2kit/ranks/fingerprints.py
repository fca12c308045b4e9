"""Collects facts about a rank's code and model, short enough to be sent to other ranks.

Contents are compared, not paths, because nodes may keep the same files in different places.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from importlib.metadata import Distribution, PackageNotFoundError, version
from pathlib import Path

import lfm2kit
from lfm2kit.building.placement import Placed
from lfm2kit.building.plugins import Plugins
from lfm2kit.checkpoint import Checkpoint
from lfm2kit.errors import TRACEBACK
from lfm2kit.memory import Exclusive
from lfm2kit.ranks.agreement import Fact, Facts
from lfm2kit.weights import Tensor

WHOLE_FILE = 1 << 20  # bytes; only the size of a larger file of a package is compared
WHOLE_MODEL = 1 << 26  # bytes; only a few rows of a larger model's matrices are compared
# The resulting plan is compared anyway, and tracebacks may be shown on a single rank.
NOT_COMPARED = {"LFM2KIT_BACKEND", TRACEBACK}


def of_environment() -> Facts:
    """Return the environment variables that lfm2kit and its plugins read."""
    names = sorted(name for name in os.environ if name.startswith("LFM2KIT_"))
    return {name: Fact(os.environ[name]) for name in names if name not in NOT_COMPARED}


def of_memories(placed: Placed) -> Facts:
    """Return the memories of the blocks that no other rank may use."""
    memories = {leaf.memory.name: leaf.memory for leaf in placed.leaves()}
    return {
        f"memory {name}": Fact(memory.unit(), is_own=True)
        for name, memory in memories.items()
        if isinstance(memory, Exclusive)
    }


def of_code(plugins: Plugins) -> Facts:
    """Return versions and contents of lfm2kit and plugins, and the versions of dependencies."""
    facts = {"lfm2kit": _package("lfm2kit", f"lfm2kit {lfm2kit.__version__}")}
    for plugin in plugins.loaded:
        facts[f"plugin {plugin.name}"] = _package(plugin.entry.module, plugin.distribution)
    for broken in plugins.broken:
        facts[f"plugin {broken.name}"] = Fact("broken", broken.reason or "")
    facts["Python"] = Fact(f"{platform.python_version()} on {platform.machine()}", sys.executable)
    distributions = [one.entry.dist for one in plugins.loaded if one.entry.dist is not None]
    return facts | {name: Fact(_version(name)) for name in sorted(_requirements(distributions))}


def of_model(checkpoint: Checkpoint) -> Facts:
    """Return the description, tensor types and shapes, file sizes and a sample of the values."""
    place = str(checkpoint.path)
    facts = {f"the model's {name}": fact for name, fact in _description(checkpoint)}
    tensors = dict(sorted(checkpoint.weights.items()))
    table = digest(f"{n} {t.format} {t.shape}".encode() for n, t in tensors.items())
    stored = sum(tensor.nbytes for tensor in tensors.values())
    facts["the tensor table"] = Fact(f"{len(tensors)} tensors of {stored} bytes, {table}", place)
    for file in checkpoint.weight_files():
        facts[f"the size of {file.name}"] = Fact(f"{os.path.getsize(file)} bytes", str(file))
    is_whole = stored <= WHOLE_MODEL
    files = checkpoint.files_of("", checkpoint.spec)
    with nullcontext() if is_whole else files.reading_exactly():
        for block, names in _by_block(tensors).items():
            samples = (_sample(tensors[name], is_whole) for name in names)
            facts[f"the content of {block}"] = Fact(digest(samples), place)
    return facts


def digest(parts: Iterable[bytes]) -> str:
    """Return a hash of the parts, in this order, as twelve hexadecimal digits."""
    result = hashlib.blake2b(digest_size=6)
    for part in parts:
        result.update(len(part).to_bytes(8, "little"))
        result.update(part)
    return result.hexdigest()


def _description(checkpoint: Checkpoint) -> Iterator[tuple[str, Fact]]:
    """Yield the config field by field, if there is one, so that a difference has a name."""
    place = str(checkpoint.path)
    if checkpoint.config is not None:
        for name, value in asdict(checkpoint.config).items():
            yield name, Fact(str(value), place)
    yield "specs", Fact(digest([repr(checkpoint.spec).encode()]), place)


def _by_block(names: Iterable[str]) -> dict[str, list[str]]:
    """Group tensor names by layer, or by block outside the layers."""
    blocks: dict[str, list[str]] = {}
    for name in names:
        block = re.match(r"layers\.\d+|\w+", name)
        blocks.setdefault(block[0] if block else name, []).append(name)
    return blocks


def _sample(tensor: Tensor, whole: bool) -> bytes:
    """Return a tensor's bytes or, if not `whole`, those of a matrix's first, middle, last row."""
    rows = tensor.shape[0] if len(tensor.shape) > 1 else 0
    if not whole and rows:
        tensor = tensor[[0, rows // 2, rows - 1]]
    return b"".join(array.tobytes() for array in tensor.arrays)


def _package(module: str, title: str) -> Fact:
    """Return a fact about the imported `module`: the hash of its sources."""
    top = sys.modules[module.partition(".")[0]]
    file = getattr(top, "__file__", None)
    if file is None:  # made by hand, or a namespace
        return Fact(title)
    place = Path(file).parent if hasattr(top, "__path__") else Path(file)
    return Fact(f"{title}, code {of_package(place)}", str(place))


def of_package(place: Path) -> str:
    """Return the hash of a package's folder or a module's file, independent of its path."""
    if place.is_file():
        return digest(_contents(place))
    files = {str(path.relative_to(place)): path for path in _sources(place)}
    return digest(
        part for name in sorted(files) for part in (os.fsencode(name), *_contents(files[name]))
    )


def _sources(folder: Path) -> Iterator[Path]:
    """Yield all files of a package except hidden and compiled ones."""
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        is_kept = any(part == "__pycache__" or part.startswith(".") for part in parts)
        if path.is_file() and not is_kept:
            yield path


def _contents(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    yield path.read_bytes() if size <= WHOLE_FILE else str(size).encode()


def _requirements(distributions: Iterable[Distribution]) -> set[str]:
    """Return the names of the packages that the distributions need, extras included."""
    lines = [line for distribution in distributions for line in distribution.requires or ()]
    names = {match[0].lower() for line in lines if (match := re.match(r"[\w.-]+", line))}
    return {name for name in names if not name.startswith("lfm2kit")}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # it belongs to an extra that nobody asked for
        return "not installed"
