"""Paths that are not a model: one line that says what each is and what to type."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lfm2kit.building.loading import EMBEDDED
from lfm2kit.checkpoint.names import INDEX, SINGLE
from tests.checkpoint.folders import Tensors, change_json, change_tensors, ones
from tests.checkpoint.typed import Cli


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the current folder, with a whole model in `model` and nothing else."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub-cache"))  # whatever this machine has
    monkeypatch.setenv("LFM2KIT_PLUGINS", "reference")  # and whichever readers are installed
    shutil.copytree(EMBEDDED / "tiny", "model")
    return Path(".")


def gguf(here: Path) -> str:
    (here / "a.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 256, 30) + bytes(4000))
    return "a.gguf"


def folder_of_gguf(here: Path) -> str:
    (here / "quantised").mkdir()
    gguf(here / "quantised")
    return "quantised"


def pytorch_model(here: Path) -> str:
    (here / "pytorch_model.bin").write_bytes(b"PK\x03\x04" + bytes(4000))
    return "pytorch_model.bin"


def folder_of_pytorch_model(here: Path) -> str:
    (here / "model" / SINGLE).unlink()
    pytorch_model(here / "model")
    return "model"


def git_lfs_pointer(here: Path) -> str:
    (here / "model" / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0")
    return "model"


def git_lfs_pointer_for_a_config(here: Path) -> str:
    (here / "model/config.json").write_text("version https://git-lfs.github.com/spec/v1\noid s")
    return "model"


def hub_folder(here: Path) -> str:
    """Make two snapshots, of which the earlier one is the main one."""
    cached = here / "models--org--name"
    for commit in ("abc", "fed"):
        shutil.copytree(here / "model", cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    return str(cached)


def hub_folder_whose_download_broke_off(here: Path) -> str:
    (here / "models--org--name" / "snapshots").mkdir(parents=True)
    return "models--org--name"


def hub_cache(here: Path) -> str:
    (here / "hub").mkdir()
    Path(hub_folder(here)).rename("hub/models--org--name")
    return "hub"


def snapshots(here: Path) -> str:
    return str(Path(hub_folder(here)) / "snapshots")


def link_to_nowhere(here: Path) -> str:
    (here / "model" / SINGLE).unlink()
    (here / "model" / SINGLE).symlink_to("../../blobs/gone")
    return "model"


def config_link_to_nowhere(here: Path) -> str:
    (here / "model/config.json").unlink()
    (here / "model/config.json").symlink_to("../../blobs/gone")
    return "model"


def model_link_to_nowhere(here: Path) -> str:
    (here / "link").symlink_to("gone")
    return "link"


def config(here: Path) -> str:
    return "model/config.json"


def answers(here: Path) -> str:
    return "model/answers.bin"


def index(here: Path) -> str:
    (here / "model" / INDEX).write_text("{}")
    return f"model/{INDEX}"


def a_blob_of_the_hub(here: Path) -> str:
    (here / "model" / SINGLE).rename("model/0123abcd")
    return "model/0123abcd"


def json_for_weights(here: Path) -> str:
    (here / "model" / SINGLE).write_text('{"error": "Repository not found"}')
    return "model"


def one_shard(here: Path) -> str:
    (here / "model" / SINGLE).rename("model/model-00001-of-00004.safetensors")
    return "model/model-00001-of-00004.safetensors"


def shards_without_an_index(here: Path) -> str:
    one_shard(here)
    return "model"


def weights_of_another_name(here: Path) -> str:
    (here / "model" / SINGLE).rename("model/model.fp16.safetensors")
    return "model"


def prefixed(prefix: str) -> Callable[[Path], str]:
    def make(here: Path) -> str:
        def change(tensors: Tensors) -> None:
            for name in list(tensors):
                tensors[prefix + name] = tensors.pop(name)

        change_tensors(here / "model", change)
        return "model"

    make.__name__ = f"prefixed_{prefix}"
    return make


def vision_language_model(here: Path) -> str:
    def change(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[f"model.language_model.{name.removeprefix('model.')}"] = tensors.pop(name)
        tensors["model.vision_tower.weight"] = ones(3)

    change_tensors(here / "model", change)
    return "model"


def adapter(here: Path) -> str:
    (here / "lora").mkdir()
    (here / "lora/adapter_config.json").write_text("{}")
    (here / "lora/adapter_model.safetensors").write_bytes(b"")
    return "lora"


def adapter_file(here: Path) -> str:
    shutil.copy(here / "model" / SINGLE, here / "adapter_model.safetensors")
    return "adapter_model.safetensors"


def adapter_beside_a_model(here: Path) -> str:
    (here / "model/adapter_config.json").write_text("{}")
    return "model"


def adapter_in_the_tensors(here: Path) -> str:
    name = "base_model.model.model.layers.0.conv.in_proj.lora_A.weight"
    change_tensors(here / "model", lambda tensors: tensors.update({name: ones(8, 128)}))
    return "model"


def quantised(method: str) -> Callable[[Path], str]:
    def make(here: Path) -> str:
        config = {"quantization_config": {"quant_method": method}}
        change_json(here / "model/config.json", **config)
        return "model"

    make.__name__ = f"quantised_{method}"
    return make


def quantised_tensors(ending: str) -> Callable[[Path], str]:
    def make(here: Path) -> str:
        name = f"model.layers.0.conv.in_proj{ending}"
        change_tensors(here / "model", lambda tensors: tensors.update({name: ones(8)}))
        return "model"

    make.__name__ = f"quantised_tensors_{ending}"
    return make


def numpy_arrays(here: Path) -> str:
    np.savez(here / "weights.npz", w=np.ones(3))
    return "weights.npz"


def onnx(here: Path) -> str:
    (here / "model.onnx").write_bytes(b"\x08\x07\x12\x07pytorch")
    return "model.onnx"


def archive(form: str) -> Callable[[Path], str]:
    def make(here: Path) -> str:
        return shutil.make_archive("packed", form, "model", ".")

    make.__name__ = f"archive_{form}"
    return make


def web_page(here: Path) -> str:
    (here / "model.bin").write_text("<!DOCTYPE html>\n<html>404: not found</html>\n" * 10)
    return "model.bin"


def web_page_for_a_config(here: Path) -> str:
    (here / "model/config.json").write_text("<html>404: not found</html>\n")
    return "model"


def pipe(here: Path) -> str:
    os.mkfifo(here / "pipe")
    return "pipe"


def pipe_in_the_folder(here: Path) -> str:
    (here / "model" / SINGLE).unlink()
    os.mkfifo(here / "model" / SINGLE)
    return "model"


def device(here: Path) -> str:
    return "/dev/zero"


def empty_file(here: Path) -> str:
    (here / "model.bin").write_bytes(b"")
    return "model.bin"


def empty_folder(here: Path) -> str:
    (here / "empty").mkdir()
    return "empty"


def tokenizer_only(here: Path) -> str:
    (here / "tokenizer").mkdir()
    (here / "tokenizer/tokenizer.json").write_text(json.dumps({}))
    return "tokenizer"


def folder_around_the_model(here: Path) -> str:
    (here / "out").mkdir()
    (here / "model").rename("out/checkpoint-500")
    return "out"


ROWS: dict[Callable[[Path], str], list[str]] = {
    gguf: ["a.gguf", "GGUF", "the plugin lfm2kit-gguf", "Hugging Face folder"],
    folder_of_gguf: ["quantised", "GGUF", "the plugin lfm2kit-gguf", "Hugging Face folder"],
    pytorch_model: ["pytorch_model.bin", "pickles", "save_pretrained"],
    folder_of_pytorch_model: ["model", "pickles", "save_pretrained"],
    git_lfs_pointer: [SINGLE, "Git LFS pointer", "git lfs pull"],
    git_lfs_pointer_for_a_config: ["config.json", "Git LFS pointer", "git lfs pull"],
    hub_folder: ["give its snapshot: models--org--name/snapshots/abc"],
    hub_folder_whose_download_broke_off: ["no snapshot", "download"],
    hub_cache: ["hub's cache", "hub/models--org--name/snapshots/abc"],
    snapshots: ["give models--org--name/snapshots/fed"],
    link_to_nowhere: [SINGLE, "a link to ../../blobs/gone", "does not exist", "cp -rL"],
    config_link_to_nowhere: ["config.json", "a link to ../../blobs/gone", "does not exist"],
    model_link_to_nowhere: ["link", "a link to gone", "does not exist"],
    config: ["config.json", "give the folder: model"],
    answers: ["answers.bin", "samples", "give the folder: model"],
    index: [INDEX, "give the folder: model"],
    a_blob_of_the_hub: ["safetensors file whose name", "give the folder: model"],
    json_for_weights: [SINGLE, "JSON text", "download"],
    one_shard: ["one shard of 4", "give the folder: model"],
    shards_without_an_index: ["shards without", INDEX],
    weights_of_another_name: ["not called", SINGLE],
    vision_language_model: ["'language_model.'", "multimodal"],
    prefixed("language_model."): ["'language_model.model.'", "multimodal"],
    prefixed("base_model.model."): ["'base_model.model.model.'", "PEFT", "merge"],
    prefixed("_orig_mod."): ["'_orig_mod.model.'", "torch.compile"],
    prefixed("module."): ["'module.model.'", "DataParallel"],
    prefixed("thinker."): ["'thinker.model.'", "inner"],
    adapter: ["LoRA adapter", "merge"],
    adapter_file: ["LoRA adapter", "merge"],
    adapter_beside_a_model: ["LoRA adapter", "merge"],
    adapter_in_the_tensors: ["LoRA adapter", "merge"],
    **{
        quantised(method): ["config.json", "quantised", method, "F32, F16 and BF16"]
        for method in ("gptq", "awq", "bitsandbytes", "compressed-tensors", "fp8", "mxfp4")
    },
    quantised_tensors(".qweight"): ["GPTQ", "F32, F16 and BF16"],
    quantised_tensors(".weight.absmax"): ["bitsandbytes"],
    quantised_tensors(".weight.quant_state.bitsandbytes__nf4"): ["bitsandbytes"],
    quantised_tensors(".weight_packed"): ["compressed-tensors"],
    quantised_tensors(".weight_scale_inv"): ["FP8"],
    quantised_tensors(".scales"): ["MLX"],
    numpy_arrays: [".npz", "safetensors"],
    onnx: [".onnx", "safetensors"],
    archive("tar"): ["tar archive", "unpack"],
    archive("gztar"): ["gzip archive", "unpack"],
    archive("zip"): ["zip archive", "unpack"],
    web_page: ["web page", "download"],
    web_page_for_a_config: ["config.json", "web page", "download"],
    pipe: ["pipe"],
    pipe_in_the_folder: [SINGLE, "pipe"],
    device: ["device"],
    empty_file: ["model.bin", "empty"],
    empty_folder: ["empty"],
    tokenizer_only: ["tokenizer", "weights"],
    folder_around_the_model: ["give out/checkpoint-500"],
}


@pytest.mark.timeout(60)  # a reader that opens a pipe waits for ever
@pytest.mark.parametrize("make", ROWS, ids=lambda make: make.__name__)
def test_what_is_no_model_is_named_with_what_to_type(
    here: Path, cli: Cli, make: Callable[[Path], str]
) -> None:
    cli("plan", "--model", make(here), "--backend", "reference").assert_fails(*ROWS[make])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("~/LFM2-8B-A1B", ["~", "unquoted"]),
        ("LiquidAI/LFM2-8B-A1B", ["hf download LiquidAI/LFM2-8B-A1B"]),
        ("https://huggingface.co/LiquidAI/LFM2-8B-A1B", ["address", "download"]),
        ("model/nowhere", ["neither a path nor an embedded model"]),
    ],
)
def test_what_is_not_there_is_told_what_it_may_have_been(
    here: Path, cli: Cli, name: str, words: list[str]
) -> None:
    cli("plan", "--model", name).assert_fails(name, *words)
