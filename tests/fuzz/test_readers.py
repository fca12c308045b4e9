"""Every reader, given structures of which parts say something else: a result or one `Lfm2kitError`.

No other exception, no more than a little memory, and what is accepted holds to its bounds.

    LFM2KIT_FUZZ_EXAMPLES=20000 pytest tests/fuzz      longer, by hand
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import pytest
import safetensors
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lfm2kit import bounds
from lfm2kit.building.load import read_load
from lfm2kit.building.plan import KINDS, Plan
from lfm2kit.building.rates import VERSION, read_calibration
from lfm2kit.chat.templates import load_template
from lfm2kit.chat.tokenizer import load_tokenizer
from lfm2kit.checkpoint import open_checkpoint
from lfm2kit.checkpoint.config import parse_config, read_config
from lfm2kit.checkpoint.convert import config_fields
from lfm2kit.checkpoint.documents import read_toml
from lfm2kit.checkpoint.huggingface import read_folder
from lfm2kit.checkpoint.model_bin import read_model_bin
from lfm2kit.checkpoint.names import CONFIG, INDEX, MODEL_BIN, SINGLE, SPECS
from lfm2kit.checkpoint.safetensors import read_safetensors
from lfm2kit.checkpoint.spec_files import read_spec
from lfm2kit.errors import Lfm2kitError
from lfm2kit.measuring.samples import read_answers, read_inputs
from tests.chat.folders import GOLDEN
from tests.checkpoint.attempt import content
from tests.checkpoint.folders import ORACLE
from tests.core.small import FIELDS
from tests.fuzz.structures import (
    changed,
    configs,
    damaged,
    deep,
    json_texts,
    odd,
    toml_text,
    values,
)

T = TypeVar("T")
MEMORY = 4_000_000  # bytes: what reading a small file may take, whatever it says

fuzzed = settings(
    max_examples=int(os.environ.get("LFM2KIT_FUZZ_EXAMPLES", "60")),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    deadline=None,
)


def attempt(read: Callable[[Path], T], path: Path) -> tuple[T | None, str]:
    """Return what reading gives, or the sentence that refuses; any other error fails the test."""
    result, error = None, ""
    tracemalloc.start()
    try:
        result = read(path)
    except Lfm2kitError as refusal:
        error = str(refusal)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MEMORY
    assert not error or str(path) in error
    return result, error


def attempt_bytes(read: Callable[[Path], T], path: Path, file: bytes) -> tuple[T | None, str]:
    path.write_bytes(file)
    return attempt(read, path)


# ---- config.json and an index ----


@fuzzed
@given(text=json_texts(configs()))
@example(text=b'{"vocab_size": ' + b"9" * 4301 + b"}")
@example(text=b"[" * 10_000)
@example(text=json.dumps({**FIELDS, "rope_theta": 5e-324}).encode())
@example(text=json.dumps({**FIELDS, "block_dim": deep(300), "hidden_size": deep(300)}).encode())
def test_a_config(tmp_path: Path, text: bytes) -> None:
    config, _ = attempt_bytes(read_config, tmp_path / CONFIG, text)
    if config is not None:
        assert parse_config(config_fields(config)) == config
        said = {key: getattr(config, key, None) or 0 for key in bounds.LARGEST}
        assert all(said[key] <= most for key, most in bounds.LARGEST.items())
        assert 1 <= config.rope_theta <= 1e12
        assert 0 < config.norm_eps <= 1


@st.composite
def indexes(draw: st.DrawFn) -> Any:
    index = json.loads((ORACLE / "odd_sharded" / INDEX).read_text())
    shards = [*set(index["weight_map"].values()), "..", "", "a/b", "nowhere.safetensors"]
    names = list(index["weight_map"])
    for name in draw(st.lists(st.sampled_from([*names, "other"]), max_size=3)):
        index["weight_map"][name] = draw(st.sampled_from(shards) | values)
    return draw(changed(index, ["extra"]))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "sharded"
    shutil.copytree(ORACLE / "odd_sharded", folder)
    return folder


@fuzzed
@given(text=json_texts(indexes()))
def test_an_index(sharded: Path, text: bytes) -> None:
    (sharded / INDEX).write_bytes(text)
    attempt(read_folder, sharded)


# ---- safetensors, beside the library ----


def safetensors_file(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


@st.composite
def safetensors_files(draw: st.DrawFn) -> bytes:
    """Draw tensors one behind the other, some of whose entries say something else."""
    header: dict[str, Any] = {}
    end = 0
    for i in range(draw(st.integers(0, 3))):
        dtype, size = draw(st.sampled_from([("F32", 4), ("BF16", 2), ("F16", 2), ("I64", 8)]))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        begin, end = end, end + size * _product(shape)
        header[f"t{i}"] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    for name in draw(st.lists(st.sampled_from([*header, "__metadata__"]), max_size=1)):
        metadata = st.dictionaries(st.text(max_size=3), st.text(max_size=3)) | odd
        entry = changed(header.get(name, {}), ["extra"]) if name in header else metadata
        header[name] = draw(entry)
    text = draw(json_texts(st.just(header)))
    return draw(damaged(safetensors_file(text, bytes(end))))


def _product(shape: list[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


# Why a file that the library takes is refused all the same: docs/decisions/0008.
REASONS = ("twice", "has dtype", "lacks dtype", "has shape", "too large", "more than")


def header(text: str) -> bytes:
    return safetensors_file(text.encode(), b"")


NOTHING_BUT = '{"t":{"dtype":"F32","shape":[0],"data_offsets":[0,0],"ignored":1}}'


@fuzzed
@given(file=safetensors_files())
@example(file=header('{"__metadata__":NaN}'))
@example(file=header('{"__metadata__":-Infinity}'))
@example(file=header('{"__metadata__":0}'))
@example(file=header('{"__metadata__":{"":7}}'))
@example(file=header('{"__metadata__":1' + "0" * 400 + "}"))
@example(file=header('{"t":{"dtype":"I64","shape":[0],"data_offsets":[0,0]}}'))
@example(file=header('{"t":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}'))
@example(file=header(NOTHING_BUT.replace("1", str(deep(125)))))
@example(file=header(NOTHING_BUT.replace("1", str(deep(126)))))
@example(file=header(NOTHING_BUT.replace("1", "1e999")))
@example(file=header(NOTHING_BUT.replace("1", "1" * 400)))
@example(
    file=safetensors_file(
        b'{"t0":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]},'
        b'"t1":{"dtype":"BF16","shape":[0],"data_offsets":[1,1]}}',
        bytes(2),
    )
)
@example(file=header('{"t":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"t":{}}'))
def test_a_safetensors_file(tmp_path: Path, file: bytes) -> None:
    tensors, error = attempt_bytes(read_safetensors, tmp_path / SINGLE, file)
    try:
        by_library = {
            name: (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
            for name, entry in safetensors.deserialize(file)
        }
    except safetensors.SafetensorError:
        lone_surrogate = "\\ud" in file.decode("latin-1")  # no model has a tensor of that name
        assert tensors is None or lone_surrogate
        return
    if tensors is None:
        assert any(reason in error for reason in REASONS), error
    else:
        assert content(tensors) == by_library


# ---- model.bin ----


@st.composite
def model_bins(draw: st.DrawFn) -> bytes:
    """Draw a table and its data, some of whose numbers say something else."""
    numbers = st.sampled_from([0, 1, 2, 7, 8, 9, 1000, 1001, 2**31, 2**32 - 1])
    rows = draw(st.integers(0, 3))
    start = 4 + rows * (4 + 2 + 4 + 4 + 16)
    table = struct.pack("<I", draw(st.just(rows) | numbers))
    for i in range(rows):
        length, ndim, size = (draw(st.just(n) | numbers) for n in (2, 1, 2))
        where = draw(st.just(start + 8 * i) | numbers)
        table += struct.pack("<I2sIIQQ", length, b"w%d" % i, ndim, size, where, 8)
    return draw(damaged(table + bytes(range(8 * rows))))


@fuzzed
@given(file=model_bins())
@example(file=b"\xff" * 64)
@example(file=struct.pack("<I", 2**32 - 1) + b"\1\0\0\0w" * 9)
def test_a_model_bin(tmp_path: Path, file: bytes) -> None:
    tensors, _ = attempt_bytes(read_model_bin, tmp_path / MODEL_BIN, file)
    for tensor in (tensors or {}).values():
        assert tensor.data.tobytes() in file
        assert len(tensor.shape) <= bounds.DIMENSIONS


# ---- TOML ----

OPERATOR = {"type": "ShortConv", "kernel_size": 3}
FEED_FORWARD = {"type": "MLP", "intermediate_size": 12}
ATTENTION = {
    "type": "Attention",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
}
MOE = {
    "type": "SparseMoe",
    "num_experts": 5,
    "num_experts_per_tok": 3,
    "intermediate_size": 12,
    "use_expert_bias": True,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
}
COMMON = {"vocab_size": 50, "hidden_size": 24, "eps": 1e-5, "norm_eps": 1e-5, "rope_theta": 1e6}


@st.composite
def spec_tables(draw: st.DrawFn) -> Any:
    layers = [
        draw(
            changed(
                {
                    "repeat": draw(st.integers(1, 3) | st.just(1000)),
                    "operator": draw(changed(draw(st.sampled_from([OPERATOR, ATTENTION])), ["x"])),
                    "feed_forward": draw(changed(draw(st.sampled_from([FEED_FORWARD, MOE])), [])),
                },
                ["x"],
            )
        )
        for _ in range(draw(st.integers(0, 3)))
    ]
    fields = draw(changed(COMMON, ["tie_word_embeddings", "vocab_sise"]))
    return {**fields, "layers": draw(st.just(layers) | odd)}


@fuzzed
@given(text=spec_tables().map(toml_text).flatmap(lambda text: damaged(text.encode())))
@example(text=b"vocab_size = " + b"9" * 4301)
@example(text=b"a = " + b"[" * 990)
@example(text=toml_text({**COMMON, "tie_word_embeddings": "false", "layers": []}).encode())
@example(text=b"a." * 100_000 + b"a = 1")
@example(text=b'\'=\'."a\\"." . ' * 15_000 + b"a = 1")
@example(text=b'"\\' * 100_000)
def test_a_model_toml(tmp_path: Path, text: bytes) -> None:
    spec, _ = attempt_bytes(read_spec, tmp_path / SPECS, text)
    if spec is not None:
        assert 1 <= len(spec.layers) <= bounds.LAYERS
        assert len(spec.parameters()) <= bounds.TENSORS
        assert isinstance(spec.tie_word_embeddings, bool)


@st.composite
def plan_tables(draw: st.DrawFn) -> Any:
    rules = [
        draw(changed({"layers": "2-4", "kind": "moe", "backend": "b"}, ["layer"]))
        for _ in range(draw(st.integers(0, 3)))
    ]
    return draw(changed({"default": "a", "rule": rules}, ["rules"]))


@fuzzed
@given(text=plan_tables().map(toml_text).flatmap(lambda text: damaged(text.encode())))
@example(text=b"default=" + b"9" * 4301)
@example(text=b"default=" + b"[" * 990)
@example(text=b'default="a"\nrule=[{layers=9223372036854775807, backend="b"}]')
def test_a_plan_file(tmp_path: Path, text: bytes) -> None:
    plan, _ = attempt_bytes(Plan.read, tmp_path / "plan.toml", text)
    for rule in plan.rules if plan is not None else ():
        assert rule.layers is None or rule.layers.stop <= bounds.LAYERS


@fuzzed
@given(text=st.binary(max_size=60))
@example(text=b"[a]\n" * 5 + b"[a.b]")
def test_any_bytes_as_toml(tmp_path: Path, text: bytes) -> None:
    attempt_bytes(read_toml, tmp_path / "any.toml", text)


# ---- a plan on the command line ----

words = st.sampled_from(["", "-", "=", ".", ",", "auto", *KINDS]) | st.text(max_size=4)
layer_texts = st.sampled_from(["0", "2-4", "4-2", "1023", "1024", "9" * 20, "9" * 4301, "-1", "1-"])
items = st.builds("{}.{}={}".format, layer_texts | words, words, words) | words


@fuzzed
@given(texts=st.lists(items, max_size=4))
@example(texts=["a", "0-9223372036854775807=b"])
def test_a_plan_as_text(texts: list[str]) -> None:
    try:
        plan = Plan.parse(",".join(texts))
    except Lfm2kitError:
        return
    assert Plan.parse(str(plan)) == plan


# ---- tokenizer_config.json ----


@st.composite
def tokenizer_configs(draw: st.DrawFn) -> Any:
    added = {"500": {"content": "<x>", "special": False}, "7": {"content": "<|im_end|>"}}
    added["500"] = draw(changed(added["500"], ["lstrip", "rstrip", "normalized", "other"]))
    templates = [draw(changed({"name": "default", "template": "a"}, ["other"]))]
    fields = json.loads((GOLDEN / "tokenizer_config.json").read_text())
    fields |= {"added_tokens_decoder": added, "chat_template": draw(st.just(templates) | odd)}
    return draw(changed(fields, ["add_bos_token", "add_eos_token", "unk_token"]))


@fuzzed
@given(text=json_texts(tokenizer_configs()))
@example(text=b'{"bos_token": "\\ud800", "added_tokens_decoder": {"' + b"9" * 5000 + b'": "a"}}')
@example(text=b'{"bos_token": "\\ud800", "chat_template": "\\ud800"}')
def test_a_tokenizer_config(tmp_path: Path, text: bytes) -> None:
    shutil.copy(GOLDEN / "tokenizer.json", tmp_path)
    path = tmp_path / "tokenizer_config.json"
    tokenizer, _ = attempt_bytes(lambda path: load_tokenizer(path.parent), path, text)
    if tokenizer is not None:
        assert tokenizer.decode(tokenizer.encode("a<|im_end|>")).endswith("a<|im_end|>")
        with suppress(Lfm2kitError):
            load_template(tmp_path, tokenizer.config).render([{"role": "user"}])


# ---- a recorded load ----


@st.composite
def loads(draw: st.DrawFn) -> Any:
    layer = {"layer": 2, "num_experts_per_tok": 2, "counts": [3, 2, 1]}
    layers = [draw(changed({**layer, "layer": i}, ["x"])) for i in range(draw(st.integers(0, 3)))]
    if layers and draw(st.booleans()):
        layers[0]["counts"] = draw(st.lists(odd, max_size=3))
    elif layers and draw(st.booleans()):
        ranks = [draw(changed({"counts": one}, ["x"])) for one in ([1, 2, 0], [2, 0, 1])]
        layers[-1]["ranks"] = draw(st.sampled_from([ranks, ranks[:1], ranks[0]]))
    fields = {"kind": "lfm2kit load", "version": 1, "model": "m", "hidden_size": 8, "tokens": 4}
    return draw(changed({**fields, "layers": layers}, ["x"]))


@fuzzed
@given(text=json_texts(loads()))
def test_a_load(tmp_path: Path, text: bytes) -> None:
    load, _ = attempt_bytes(read_load, tmp_path / "load.json", text)
    for shares in load.shares() if load is not None else ():
        assert all(0 <= share <= 1 for share in shares)


# ---- rates ----


@st.composite
def rate_files(draw: st.DrawFn) -> Any:
    experts = {"backend": "b", "precision": "p", "stored": "F32", "memory": "host"}
    sizes = {"hidden_size": 8, "intermediate_size": 4, "expert_bytes": 384}
    measured = {"rows": [1, 4], "seconds": [1e-6, 2e-6], "hardware": {}}
    link = draw(changed({"from_host": 1e9, "to_host": 1e9}, ["x"]) | odd)
    fields = {**experts, **sizes, **measured, "link": link, "ceilings": None}
    if draw(st.booleans()):
        fields["seconds"] = draw(st.lists(odd, min_size=2, max_size=2))
    side = draw(changed(fields, ["x"]))
    head = {"kind": "lfm2kit rates", "version": VERSION, "date": "", "machine": {}, "model": "m"}
    return draw(changed({**head, "sides": [side]}, ["x"]))


@fuzzed
@given(text=json_texts(rate_files()))
def test_a_file_of_rates(tmp_path: Path, text: bytes) -> None:
    calibration, _ = attempt_bytes(read_calibration, tmp_path / "rates.json", text)
    for side in calibration.sides if calibration is not None else ():
        assert 0 < side.product.at(3) < float("inf")


# ---- samples ----


@fuzzed
@given(
    rows=st.sampled_from([0, 1, 2, 3, -1, 2**31 - 1]),
    columns=st.sampled_from([0, 1, 2, -1, 2**31 - 1]),
    data=st.binary(max_size=32),
    read=st.sampled_from([read_inputs, read_answers]),
)
def test_samples(tmp_path: Path, rows: int, columns: int, data: bytes, read: Any) -> None:
    file = struct.pack("<ii", rows, columns) + data
    array, _ = attempt_bytes(read, tmp_path / "samples.bin", file)
    assert array is None or array.tobytes() == data


# ---- a folder ----

CONTENTS = {
    CONFIG: json.dumps(FIELDS).encode(),
    SPECS: toml_text(COMMON).encode(),
    SINGLE: header("{}"),
    INDEX: b'{"weight_map": {"a": "model-00001-of-00002.safetensors"}}',
    MODEL_BIN: bytes(4),
    "model-00001-of-00002.safetensors": header("{}"),
    "adapter_config.json": b"{}",
    "tokenizer.json": b"{}",
    "pytorch_model.bin": b"PK\x03\x04",
    "refs": b"",
}
KINDS_OF_FILE = ["file", "file", "empty", "page", "folder", "link", "pipe"]


def put(path: Path, kind: str) -> None:
    """Put something at `path`, sound or not."""
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("nowhere")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        pages = {"empty": b"", "page": b"<html>not found"}
        path.write_bytes(pages.get(kind, CONTENTS[path.name]))


@fuzzed
@given(
    found=st.dictionaries(st.sampled_from(sorted(CONTENTS)), st.sampled_from(KINDS_OF_FILE)),
    part=st.sampled_from(["", *CONTENTS]),
)
@pytest.mark.timeout(300)  # a reader that opens a pipe waits for ever
def test_a_folder_of_anything(tmp_path: Path, found: dict[str, str], part: str) -> None:
    folder = tmp_path / "model"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, kind in found.items():
        put(folder / name, kind)
    with suppress(Lfm2kitError):
        open_checkpoint(folder / part)
