"""A model's name on the Hugging Face hub means what the hub's cache on this machine has of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lfm2kit.building.loading import find_model, load_model
from lfm2kit.chat.tokenizer import load_tokenizer
from lfm2kit.checkpoint import open_checkpoint
from lfm2kit.checkpoint.hub_cache import NAME, cache_folder, name_of
from lfm2kit.checkpoint.names import CONFIG, INDEX, SINGLE
from lfm2kit.errors import Lfm2kitError
from tests.checkpoint.folders import ORACLE, change_json, copied
from tests.checkpoint.typed import Cli

LFM2, COMMIT = "LiquidAI/LFM2-8B-A1B", "0123456789abcdef0123456789abcdef01234567"
VARIABLES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")
FIRST = "model-00001-of-00009.safetensors"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make an empty cache the one that is used, and a folder beside it the current one."""
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "hub"


def cache(hub: Path, case: str = "odd_sharded", name: str = LFM2, commit: str = COMMIT) -> Path:
    """Put one of tests/oracle's checkpoints into the cache as the hub's library does."""
    model = hub / f"models--{name.replace('/', '--')}"
    blobs, snapshot = model / "blobs", model / "snapshots" / commit
    for folder in (blobs, snapshot, model / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    for path in copied(case, hub / "copy").iterdir():
        path.rename(blobs / f"{commit}-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/{commit}-{path.name}")
    (hub / "copy").rmdir()
    (model / "refs" / "main").write_text(commit)
    return snapshot


def test_a_name_is_the_snapshot_that_main_is(hub: Path) -> None:
    snapshot = cache(hub)
    cache(hub, "odd_kernel_1", commit="f" * 40)
    (hub / "models--LiquidAI--LFM2-8B-A1B" / "refs" / "main").write_text(COMMIT + "\n")
    assert find_model(LFM2) == snapshot
    assert open_checkpoint(snapshot).spec == open_checkpoint(ORACLE / "odd_sharded").spec
    assert len(load_model(LFM2, "reference").spec.layers) == 4


def test_commands_take_the_name(hub: Path, cli: Cli) -> None:
    snapshot = cache(hub)
    assert str(snapshot) in cli("plan", "--model", LFM2, "--backend", "reference").out
    assert "[[layers]]" in cli("specs", LFM2).out


def test_a_path_of_that_name_comes_first(hub: Path) -> None:
    cache(hub)
    copied("odd_kernel_1", Path(LFM2))
    assert find_model(LFM2) == Path(LFM2)
    shutil.rmtree(LFM2)
    Path(LFM2).symlink_to("nowhere")
    with pytest.raises(Lfm2kitError, match="link"):
        find_model(LFM2)


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({}, "~/.cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/xdg", "HF_HOME": "/hf"}, "/hf/hub"),
        ({"HF_HOME": "~/hf"}, "~/hf/hub"),
        ({"HF_HOME": "$WHERE/hf", "WHERE": "/there"}, "/there/hf/hub"),
        ({"HF_HOME": "/hf", "HUGGINGFACE_HUB_CACHE": "/older"}, "/older"),
        ({"HUGGINGFACE_HUB_CACHE": "/older", "HF_HUB_CACHE": "/newer"}, "/newer"),
        ({"XDG_CACHE_HOME": "", "HF_HOME": "", "HF_HUB_CACHE": ""}, "~/.cache/huggingface/hub"),
    ],
)
def test_the_cache_is_where_the_hubs_library_has_it(
    hub: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], folder: str
) -> None:
    monkeypatch.delenv("HF_HUB_CACHE")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(folder).expanduser()


def refused(cli: Cli, *words: str) -> None:
    cli("plan", "--model", LFM2).assert_fails(LFM2, f"hf download {LFM2}", *words)


def test_a_model_that_is_not_there_says_where_it_was_looked_for(hub: Path, cli: Cli) -> None:
    refused(cli, str(hub), "neither such a path nor such a model")


@pytest.mark.parametrize("missing", [CONFIG, FIRST, "model-00003-of-00009.safetensors"])
def test_a_snapshot_that_lacks_a_file_is_one_line(hub: Path, cli: Cli, missing: str) -> None:
    snapshot = cache(hub)
    (snapshot / missing).resolve().unlink()
    refused(cli, missing, str(snapshot))  # a link to nowhere
    (snapshot / missing).unlink()
    refused(cli, missing, str(snapshot))


def test_a_snapshot_of_texts_alone_lacks_weights(hub: Path, cli: Cli) -> None:
    snapshot = cache(hub, "odd_kernel_1")
    (snapshot / SINGLE).unlink()
    (snapshot / "tokenizer.json").write_text("{}")
    refused(cli, SINGLE)


def test_shards_without_their_index_are_named_as_in_any_folder(hub: Path, cli: Cli) -> None:
    (cache(hub) / INDEX).unlink()
    cli("plan", "--model", LFM2).assert_fails("shards without", INDEX)


@pytest.mark.parametrize("commit", [None, "", "../../elsewhere", "f" * 40, "0" * 10_000_000])
def test_a_model_without_its_main_version_is_one_line(
    hub: Path, cli: Cli, commit: str | None
) -> None:
    main = cache(hub).parents[1] / "refs" / "main"
    main.unlink()
    if commit is not None:
        main.write_text(commit)
    refused(cli, "refs/main")


def test_a_snapshot_that_is_no_folder_is_one_line(hub: Path, cli: Cli) -> None:
    snapshot = cache(hub)
    shutil.rmtree(snapshot)
    snapshot.touch()
    cli("plan", "--model", LFM2).assert_fails(str(snapshot), "Not a directory")


@pytest.mark.parametrize(
    "name", ["../x", "a/..", "a--b/c", "a/b.", "-a/b", "a/b/c", "a", ".a/b", "a./b", "é/b", "a/b\n"]
)
def test_what_the_hub_has_no_name_for_is_not_looked_for(name: str) -> None:
    assert NAME.fullmatch(name) is None


def test_a_plain_folder_that_lacks_a_shard_is_one_line(hub: Path, cli: Cli) -> None:
    folder = copied("odd_sharded", Path("model"))
    (folder / FIRST).unlink()
    cli("plan", "--model", "model").assert_fails(FIRST)


def test_a_quantised_model_in_the_cache_is_explained(hub: Path, cli: Cli) -> None:
    snapshot = cache(hub, "odd_kernel_1")
    change_json(snapshot / CONFIG, quantization={"bits": 4, "group_size": 64})
    cli("plan", "--model", LFM2).assert_fails(CONFIG, "quantised")


def test_a_snapshot_without_a_tokenizer_is_to_be_downloaded_and_not_copied_to(
    hub: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = cache(hub)
    advice = f"has no tokenizer.json, which text needs; type 'hf download {LFM2}'"
    for model in (LFM2, snapshot):
        cli("generate", "a", "--model", model).assert_fails(str(snapshot), advice)
    monkeypatch.chdir(snapshot)
    cli("tokenize", "a", "--model", ".").assert_fails(advice)
    assert name_of(snapshot) == LFM2
    assert name_of(snapshot.parent) is None
    assert name_of(hub / "models--a" / "snapshots" / COMMIT) is None


def test_a_repository_of_gguf_files_alone_has_no_tokenizer_to_download(hub: Path) -> None:
    snapshot = cache(hub)
    (snapshot / CONFIG).unlink()
    with pytest.raises(Lfm2kitError, match="which text needs; copy it beside the model"):
        load_tokenizer(snapshot)
