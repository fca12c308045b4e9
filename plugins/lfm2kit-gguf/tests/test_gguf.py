"""GGUF files as llama.cpp's converter writes them: what is read from them, and what is refused."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from lfm2kit_gguf import header, open_file, recognises
from lfm2kit_gguf.formats import format_of

import lfm2kit
from lfm2kit.batch import Batch
from lfm2kit.building.plugins import InstalledReader, installed_plugins
from lfm2kit.checkpoint import open_checkpoint, write_safetensors
from lfm2kit.checkpoint.config import model_spec, parse_config
from lfm2kit.formats import F32

CONFIG: dict[str, Any] = {
    "model_type": "lfm2_moe",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_dense_layers": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "use_expert_bias": True,
    "routed_scaling_factor": 1.0,
    "conv_L_cache": 3,
    "conv_bias": False,
    "norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 4096,
}
DENSE = {"model_type": "lfm2", "block_auto_adjust_ff_dim": False}
# As llama.cpp's src/llama-arch.cpp has them, and not as the library's table says.
NAMES = {
    "embed_tokens.weight": "token_embd.weight",
    "embedding_norm.weight": "token_embd_norm.weight",
    "lm_head.weight": "output.weight",
}
NAMES_IN_LAYERS = {
    "operator_norm.weight": "attn_norm.weight",
    "ffn_norm.weight": "ffn_norm.weight",
    "conv.in_proj.weight": "shortconv.in_proj.weight",
    "conv.conv.weight": "shortconv.conv.weight",
    "conv.out_proj.weight": "shortconv.out_proj.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.out_proj.weight": "attn_output.weight",
    "self_attn.q_layernorm.weight": "attn_q_norm.weight",
    "self_attn.k_layernorm.weight": "attn_k_norm.weight",
    "feed_forward.w1.weight": "ffn_gate.weight",
    "feed_forward.w2.weight": "ffn_down.weight",
    "feed_forward.w3.weight": "ffn_up.weight",
    "feed_forward.gate.weight": "ffn_gate_inp.weight",
    "feed_forward.expert_bias": "exp_probs_b.bias",
    "feed_forward.experts.w1.weight": "ffn_gate_exps.weight",
    "feed_forward.experts.w2.weight": "ffn_down_exps.weight",
    "feed_forward.experts.w3.weight": "ffn_up_exps.weight",
}
Arrays = Mapping[str, np.ndarray]
Edit = Callable[[Path], Path]


def random_arrays(config: Mapping[str, Any], *, tied: bool = True) -> Arrays:
    """Return weights by canonical name; those of norms lie around 1."""
    rng, arrays = np.random.default_rng(0), {}
    for name, shape in model_spec(parse_config(config), tied=tied).parameters().items():
        values = rng.standard_normal(shape) * (0.1 if "norm" in name else 0.5 / shape[-1] ** 0.5)
        arrays[name] = (values + ("norm" in name)).astype(np.float32)
    return arrays


def stored_arrays(arrays: Arrays) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the arrays as GGUF has them: filters in two dimensions, experts in one array."""
    groups: dict[str, list[np.ndarray]] = {}
    for name, array in arrays.items():
        groups.setdefault(re.sub(r"\.experts\.\d+\.", ".experts.", name), []).append(array)
    for name, group in groups.items():
        in_layer = re.fullmatch(r"layers\.(\d+)\.(.*)", name)
        stored = f"blk.{in_layer[1]}.{NAMES_IN_LAYERS[in_layer[2]]}" if in_layer else NAMES[name]
        array = np.stack(group) if "experts." in name else group[0]
        yield stored, array[:, 0] if name.endswith("conv.conv.weight") else array


def kind_of(name: str, array: np.ndarray, kind: Kind) -> Kind:
    """Return the type in which llama.cpp keeps a tensor where matrices have the type `kind`."""
    is_small = array.ndim < 2 or name.endswith(("shortconv.conv.weight", "ffn_gate_inp.weight"))
    return Kind.F32 if is_small else kind


def add_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    kinds = config["layer_types"]
    writer.add_block_count(len(kinds))
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv([config["num_key_value_heads"] * (kind != "conv") for kind in kinds])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_shortconv_l_cache(config["conv_L_cache"])
    writer.add_tokenizer_model("none")
    if config["model_type"] == "lfm2_moe":
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
        writer.add_leading_dense_block_count(config["num_dense_layers"])
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def write(
    path: Path,
    config: Mapping[str, Any] = CONFIG,
    kind: Kind = Kind.F32,
    *,
    arrays: Arrays | None = None,
    edit: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    without: str = "",
    **options: Any,
) -> Path:
    """Write a model; `edit` may add keys, and the tensor `without` is left out."""
    architecture = {"lfm2_moe": "lfm2moe", "lfm2": "lfm2"}[config["model_type"]]
    writer = gguf.GGUFWriter(path, architecture, **options)
    add_keys(writer, config)
    edit(writer)
    for name, array in stored_arrays(random_arrays(config) if arrays is None else arrays):
        if name != without:
            its = kind_of(name, array, kind)
            writer.add_tensor(name, gguf.quantize(array, its), raw_dtype=its)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_twin(folder: Path, config: Mapping[str, Any], arrays: Arrays) -> Path:
    """Write the same model as Hugging Face would."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    with open(folder / "model.safetensors", "wb") as file:
        entries = [(name, F32, array.shape) for name, array in arrays.items()]
        write_safetensors(file, entries, lambda name: [arrays[name]])
    return folder


def logits_of(path: Path) -> np.ndarray:
    batch = Batch.of_sequences([[1, 2, 3, 95, 7], [4, 5, 6, 7, 8, 9, 10]])
    return lfm2kit.load_model(path, "reference").logits(batch).copy()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("config", [CONFIG, CONFIG | DENSE], ids=["moe", "dense"])
def test_a_file_of_float32_gives_the_bits_of_its_safetensors_twin(
    tmp_path: Path, config: dict[str, Any], tied: bool
) -> None:
    arrays = random_arrays(config, tied=tied)
    twin = write_twin(tmp_path / "twin", config, arrays)
    path = write(tmp_path / "model.gguf", config, arrays=arrays)
    assert np.array_equal(logits_of(path), logits_of(twin))


# Half a step of each type, relative to the largest value of a matrix.
HALF_STEPS = {Kind.BF16: 2**-8, Kind.Q8_0: 0.51 / 127, Kind.Q4_0: 1.01 / 8}


@pytest.mark.parametrize("kind", HALF_STEPS)
def test_rounded_matrices_give_the_bits_of_their_values(tmp_path: Path, kind: Kind) -> None:
    """Which lie half a step at most from those that were rounded; w1 and w3 are further apart."""
    arrays = random_arrays(CONFIG)
    path = write(tmp_path / "model.gguf", kind=kind)
    values = {name: tensor.float32() for name, tensor in open_file(path).weights.items()}
    for name, array in arrays.items():
        error = np.abs(values[name] - array).max() / np.abs(array).max()
        assert error <= HALF_STEPS[kind], name
    got = logits_of(path)
    assert np.array_equal(got, logits_of(write_twin(tmp_path / "values", CONFIG, values)))
    assert not np.array_equal(got, logits_of(write_twin(tmp_path / "whole", CONFIG, arrays)))


def test_plain_tensors_are_views_of_the_file_and_others_are_blocks_of_it(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", kind=Kind.Q8_0)
    weights = open_file(path).weights
    assert weights["embedding_norm.weight"].format == F32
    expert = weights["layers.1.feed_forward.experts.3.w3.weight"]
    assert (str(expert.format), expert.shape, expert.data.shape) == ("Q8_0", (32, 64), (32, 2))
    assert expert.nbytes == 32 * 2 * 34
    assert {Path(getattr(one.data, "filename", "")) for one in weights.values()} == {path}


def test_the_configuration_is_that_of_the_twin(tmp_path: Path) -> None:
    for config in (CONFIG, CONFIG | DENSE):
        path = write(tmp_path / "model.gguf", config)
        assert open_file(path).config == replace(parse_config(config), tie_word_embeddings=None)


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_K, Kind.Q6_K, Kind.Q8_0, Kind.IQ4_XS])
def test_types_that_the_library_unpacks_are_formats(kind: Kind) -> None:
    values, size = gguf.GGML_QUANT_SIZES[kind]
    rows = np.random.default_rng(0).integers(0, 50, (3, 2, 2 * size), np.uint8)
    made = format_of(kind)
    assert (made.block_values, made.block_bytes) == (values, size)
    unpacked = made.unpack(rows.view(made.block))
    assert unpacked.shape == (3, 2, 2 * values)
    assert np.array_equal(unpacked, gguf.dequantize(rows, kind))


def test_a_type_that_the_library_cannot_unpack_is_named(tmp_path: Path) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("dense_2", np.zeros((1, 40), np.uint8), raw_dtype=Kind.Q8_1)

    path = write(tmp_path / "model.gguf", edit=add)
    assert "tensor 'dense_2' is of type Q8_1, which the library gguf cannot" in refusal(path)


def test_files_alone_are_recognised_and_by_their_first_bytes(tmp_path: Path) -> None:
    (tmp_path / "other.gguf").write_bytes(b"GGML and so on")
    assert recognises(write(tmp_path / "model"))
    assert not recognises(tmp_path / "other.gguf")
    assert not recognises(tmp_path)


# ---- models in several files ----


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    write(tmp_path / "model.gguf", split_max_tensors=16)
    return sorted(tmp_path.iterdir())


def test_parts_are_one_model(parts: list[Path], tmp_path: Path) -> None:
    assert [part.name[-20:] for part in parts] == [
        f"-{i:05}-of-{len(parts):05}.gguf" for i in range(1, len(parts) + 1)
    ]
    assert open_file(parts[0]).weight_files() == parts
    assert np.array_equal(logits_of(parts[0]), logits_of(write(tmp_path / "whole.gguf")))


def test_another_part_than_the_first_names_the_first(parts: list[Path]) -> None:
    with pytest.raises(lfm2kit.Lfm2kitError, match=f"in 3 files; give {parts[0]}$"):
        open_file(parts[1])


def test_a_missing_part_is_named(parts: list[Path]) -> None:
    parts[2].unlink()
    with pytest.raises(lfm2kit.Lfm2kitError, match=f"in 3 files; there is no {parts[2]}$"):
        open_file(parts[0])


def test_a_part_that_cannot_be_read_is_one_line(
    parts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests may run as root, who may read everything: here the part is a folder when it is read."""
    parts[1].unlink()
    parts[1].mkdir()
    monkeypatch.setattr(Path, "is_file", lambda self: True)
    with pytest.raises(lfm2kit.Lfm2kitError, match=f"^{parts[1]}: Is a directory$"):
        open_file(parts[0])


def test_a_part_of_another_place_is_refused(parts: list[Path]) -> None:
    parts[2].write_bytes(parts[1].read_bytes())
    with pytest.raises(lfm2kit.Lfm2kitError, match=f"^{parts[2]}: not part 3 of 3"):
        open_file(parts[0])


def test_a_part_with_another_name_is_refused(parts: list[Path], tmp_path: Path) -> None:
    parts[0].rename(tmp_path / "first.gguf")
    with pytest.raises(lfm2kit.Lfm2kitError, match="its name does not end so"):
        open_file(tmp_path / "first.gguf")


# ---- what is refused, in one line ----


@cache
def readers() -> list[InstalledReader]:
    return list(installed_plugins().readers.values())


def refusal(path: Path) -> str:
    """Return the line that refuses a file, through the same door as every command."""
    with pytest.raises(lfm2kit.Lfm2kitError) as caught:
        open_checkpoint(path, readers())
    said = str(caught.value)
    assert "\n" not in said
    assert str(path) in said
    assert "LFM2KIT_PLUGINS" not in said  # which would mean that the reader has raised a bug
    return said


def test_another_architecture_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "llama.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.ones((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    said = refusal(tmp_path / "llama.gguf")
    assert "its architecture is 'llama'; lfm2kit runs lfm2moe and lfm2" in said


def test_a_missing_tensor_is_named_as_the_file_would(tmp_path: Path) -> None:
    for name in ("token_embd.weight", "blk.2.ffn_up_exps.weight", "blk.1.exp_probs_b.bias"):
        path = write(tmp_path / "model.gguf", without=name)
        assert refusal(path).endswith(f"there is no tensor '{name}'")


def test_a_tensor_too_many_is_named(tmp_path: Path) -> None:
    path = write(
        tmp_path / "model.gguf",
        edit=lambda writer: writer.add_tensor("dense_2.weight", np.ones((4, 4), np.float32)),
    )
    assert "the model has no place for tensor dense_2.weight" in refusal(path)


@pytest.mark.parametrize("key", ["block_count", "expert_count", "attention.head_count_kv"])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    def remove(writer: gguf.GGUFWriter) -> None:
        del writer.kv_data[0][f"lfm2moe.{key}"]

    path = write(tmp_path / "model.gguf", edit=remove)
    assert refusal(path).endswith(f"key 'lfm2moe.{key}' is missing")


WRONG: dict[str, tuple[Any, str]] = {
    "block_count": (9, "for each of 9 layers"),
    "attention.head_count_kv": ([0, 2, 0, 1], r"is \[0, 2, 0, 1\]; expected 0 or one other number"),
    "embedding_length": (0, "hidden_size is 0; expected a whole number"),
    "expert_count": (8, r"has shape \[4, 32, 64\]; expected \[8, rows, columns\]"),
    "expert_gating_func": (1, "supports only experts that are scored by a sigmoid"),
    "expert_weights_norm": (False, "supports only experts whose weights add up to 1"),
    "vocab_size": (97, r"shape \[96, 64\], but the model needs \[97, 64\]"),
    "attention.value_length": (8, "supports only 16, the width of a head"),
    "rope.dimension_count": (8, "supports only 16, the width of a head"),
    "attention.causal": (False, "supports only causal attention"),
}


@pytest.mark.parametrize("key", WRONG)
def test_a_wrong_key_is_named(tmp_path: Path, key: str) -> None:
    value, said = WRONG[key]

    def change(writer: gguf.GGUFWriter) -> None:
        values = writer.kv_data[0]
        kind = gguf.GGUFValueType.get_type(value)
        values[f"lfm2moe.{key}"] = gguf.GGUFValue(value, kind)

    assert re.search(said, refusal(write(tmp_path / "model.gguf", edit=change)))


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    whole = write(tmp_path / "model.gguf").read_bytes()
    path = tmp_path / "short.gguf"
    for length in (4, 8, 23, 24, 100, 600, len(whole) // 2, len(whole) - 64):
        path.write_bytes(whole[:length])
        assert "(truncated download?)" in refusal(path)


def test_lists_without_end_and_other_byte_orders_are_refused_at_once(tmp_path: Path) -> None:
    sizes, key = struct.pack("<IQQ", 3, 0, 1), struct.pack("<Q", 1) + b"a"
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + sizes + key + struct.pack("<IIQ", 9, 8, 2**60) + bytes(4000))
    assert f"a list in its header claims {2**60} texts" in refusal(path)
    path.write_bytes(b"GGUF" + sizes + key + struct.pack("<IIQ", 9, 4, 2**60) + bytes(4000))
    assert f"needs {4 * 2**60 + 49} bytes" in refusal(path)
    path.write_bytes(b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(4000))
    assert "in another byte order" in refusal(path)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 9, 0, 0) + bytes(4000))
    assert "version 9" in refusal(path)


@pytest.mark.parametrize(("counts", "said"), [((0, 2**40), "kv_count"), ((2**40, 0), "tensor_")])
def test_counts_without_end_are_refused_at_once(
    tmp_path: Path, counts: tuple[int, int], said: str
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts) + bytes(4000))
    assert re.search(f"its {said}.* is {2**40}; lfm2kit takes up to", refusal(path))


def test_headers_without_end_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header, "MOST_BYTES", 200)
    assert refusal(write(tmp_path / "model.gguf")).endswith("does not end within 200 bytes")


@pytest.mark.filterwarnings("error")
def test_damaged_headers_never_end_in_anything_but_one_line(tmp_path: Path) -> None:
    """Or are read, where the damage is harmless: in a key that nobody asks for."""
    whole = write(tmp_path / "model.gguf").read_bytes()
    end = int(gguf.GGUFReader(tmp_path / "model.gguf").data_offset)
    rng, path, said = np.random.default_rng(0), tmp_path / "damaged.gguf", []
    for _ in range(100):
        damaged = bytearray(whole)
        for at in rng.integers(4, end, rng.integers(1, 4)):
            damaged[at] = rng.choice([0, 1, 127, 255, int(rng.integers(256))])
        path.write_bytes(damaged)
        try:
            open_checkpoint(path, readers())
        except lfm2kit.Lfm2kitError as error:
            said.append(str(error))
    assert len(said) > 50
    assert not [line for line in said if "\n" in line or "raised" in line]


# ---- llama.cpp itself ----


def test_llama_cpp_says_the_same_of_the_same_file(tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    ids = list(range(1, 24))
    for kind in (Kind.F32, Kind.BF16):
        path = write(tmp_path / f"{kind.name}.gguf", kind=kind)
        batch = Batch.of_sequences([ids[: i + 1] for i in range(len(ids))])
        ours = lfm2kit.load_model(path, "reference").logits(batch).copy()
        theirs = llama_logits(llama_cpp, path, ids)
        assert np.array_equal(ours.argmax(axis=1), theirs.argmax(axis=1))
        assert np.abs(ours - theirs).max() < (1e-5 if kind == Kind.F32 else 0.02)


def llama_logits(llama_cpp: Any, path: Path, ids: list[int]) -> np.ndarray:
    """Return the logits after each token, in float32 throughout if the file has nothing else."""
    model = llama_cpp.Llama(
        str(path),
        n_ctx=64,
        logits_all=True,
        verbose=False,
        n_threads=1,
        flash_attn=False,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
    )
    model.eval(ids)
    return np.array(model.scores[: len(ids)])
