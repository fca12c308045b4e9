"""Recognises paths and tensor names that are not a model for lfm2kit.

For each there is one sentence: what it is, and what to type.  `lfm2kit.checkpoint.file_kinds`
recognises single files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from fnmatch import filter as matching
from pathlib import Path

from lfm2kit.checkpoint import hub_cache
from lfm2kit.checkpoint.file_kinds import NO_PICKLES, broken_link, check_file, is_safetensors
from lfm2kit.checkpoint.names import CONFIG, EMBEDDING, INDEX, SINGLE, WEIGHTS
from lfm2kit.checkpoint.quantised import said_by_names
from lfm2kit.errors import Lfm2kitError

ADAPTER = (
    "a LoRA adapter, which lfm2kit does not apply; merge it into its model with PEFT "
    "(merge_and_unload, save_pretrained) and give that folder"
)

# Files that tell what a folder without a model's weights is, the surest sign first.
SIGNS: Sequence[tuple[str, str]] = (
    ("adapter_model.*", f"there is {ADAPTER}"),
    ("model-*-of-*.safetensors", f"there are shards without {INDEX}; download that as well"),
    ("*.safetensors", f"the weights are not called {SINGLE}; rename the file, or give it"),
    ("pytorch_model*.bin", f"the weights are pickles (PyTorch's), {NO_PICKLES}"),
    ("*.pth", f"the weights are pickles (PyTorch's), {NO_PICKLES}"),
    (
        "*.gguf",
        "there is only GGUF, of which lfm2kit reads a file with the plugin lfm2kit-gguf; give the "
        "file, or the Hugging Face folder",
    ),
    ("*.onnx", "there is only ONNX, which lfm2kit does not read; give the Hugging Face folder"),
    ("*.h5", "the weights are TensorFlow's, which lfm2kit does not read; give safetensors"),
)
SAMPLES = ("inputs.bin", "outputs.bin", "answers.bin")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")

# What wraps a model puts its name before every tensor's; the longest first.
WRAPPERS = {
    "base_model.model.": "PEFT: merge the adapter (merge_and_unload) and save again",
    "language_model.": "a multimodal model: save its language_model by itself",
    "_orig_mod.": "torch.compile: save the model's _orig_mod",
    "module.": "DataParallel or its like: save the model's module",
}


def check_model(path: Path) -> None:
    """Raise `Lfm2kitError` if `path` is known to be something other than a model."""
    if not os.path.exists(path):
        raise Lfm2kitError(f"{path}: {broken_link(path) or 'no such file or folder'}")
    if os.path.isdir(path):
        sentence = _folder(path)
    else:
        check_file(path)
        sentence = _part(path)
    if sentence is not None:
        raise Lfm2kitError(f"{path}: {sentence}")


def check_names(path: Path, names: Collection[str]) -> None:
    """Raise `Lfm2kitError` if canonical names show quantised weights or a wrapped model."""
    if (quantised := said_by_names(names)) is not None:
        raise Lfm2kitError(f"{path}: {quantised}")
    if any(".lora_A." in name or ".lora_B." in name for name in names):
        raise Lfm2kitError(f"{path}: the tensors are of {ADAPTER}")
    inner = [name for name in names if name.endswith(f".{EMBEDDING}")]
    if EMBEDDING in names or not inner:
        return
    prefix = inner[0].removesuffix(EMBEDDING)
    known = (saved for wrapper, saved in WRAPPERS.items() if wrapper in prefix)
    raise Lfm2kitError(
        f"{path}: the model's tensor names begin with '{prefix}', as saved from "
        + next(known, "a model around this one: save the inner one by itself")
    )


def why_absent(name: str) -> str | None:
    """Explain a model's name that is not a path, and say what to type; None if unknown."""
    if (link := broken_link(Path(name))) is not None:
        return link
    if name.startswith("~"):
        return f"the shell replaces '~' only at the start of an unquoted word; type {name} as one"
    if "://" in name:
        return "this is an address, and lfm2kit downloads nothing; download the folder and give it"
    if hub_cache.NAME.fullmatch(name) and not os.path.exists(name.split("/")[0]):
        return (
            "there is neither such a path nor such a model in the hub's cache, "
            f"{hub_cache.cache_folder()}, and lfm2kit downloads nothing; "
            f"type '{hub_cache.to_download(name)}'"
        )
    return None


def _part(path: Path) -> str | None:
    """Explain a file that belongs to a model, but is not one."""
    give_folder = f"give the folder: {path.parent}"
    shard = re.search(r"-\d+-of-(\d+)\.safetensors$", path.name)
    if shard is not None and int(shard[1][:9]) > 1:
        return f"this is one shard of {shard[1][:9].lstrip('0')}; {give_folder}"
    if path.name in SAMPLES:
        return f"this holds samples, not weights; {give_folder}"
    if path.name.startswith("adapter_model."):
        return f"this is {ADAPTER}"
    if path.suffix != ".safetensors" and is_safetensors(path):
        return f"this is a safetensors file whose name says otherwise; {give_folder}"
    if path.suffix in (".json", ".jinja", ".txt", ".md"):
        return f"this is a text that belongs to a model, not its weights; {give_folder}"
    return None


def _folder(folder: Path) -> str | None:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        return error.strerror
    if "adapter_config.json" in names:  # beside a whole model as well: transformers applies it
        return f"there is {ADAPTER}"
    if any(name in WEIGHTS for name in names):
        return None
    if not names:
        return "the folder is empty; give one with config.json and model.safetensors"
    if (elsewhere := _elsewhere(folder, names)) is not None:
        return elsewhere
    for sign, sentence in SIGNS:
        if matching(names, sign):
            return sentence
    if CONFIG not in names and any(name in TOKENIZER for name in names):
        return f"there is a tokenizer, but neither {CONFIG} nor weights; give the model's folder"
    return None


def _elsewhere(folder: Path, names: Sequence[str]) -> str | None:
    """Explain a folder around models: the hub's cache, a model's folder in it, training output."""
    if cached := matching(names, "models--*"):
        return f"this is the hub's cache, not a model; {_snapshot(folder / cached[0])}"
    if "snapshots" in names:
        return f"this is a model's place in the hub's cache; {_snapshot(folder)}"
    inner = [name for name in names if os.path.isfile(folder / name / CONFIG)]
    if CONFIG not in names and inner:
        return f"the model is in a folder below this one; give {folder / inner[-1]}"
    return None


def _snapshot(cached: Path) -> str:
    """Say which snapshot of a model in the hub's cache to give: the main one, or the last."""
    commits = hub_cache.snapshots(cached)
    if not commits:
        return "it has no snapshot; download the model again"
    chosen = hub_cache.main_snapshot(cached) or cached / "snapshots" / commits[-1]
    return f"give its snapshot: {chosen}"
