"""Figures are those of the models' own logprobs, however these are computed; errors are lines."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lfm2kit_perplexity.options import perplexity
from lfm2kit_perplexity.scoring import score, windows_at_once
from lfm2kit_perplexity.text import Text
from lfm2kit_perplexity.windows import Window, batch_of, windows
from lfm2kit_perplexity.work import Work

import lfm2kit
from lfm2kit.backend import HOST
from lfm2kit.building.loading import Setup, find_model, set_up
from lfm2kit.building.options import Options
from lfm2kit.chat.tokenizer import load_tokenizer
from lfm2kit.cli.options import open_model
from lfm2kit.model import LFM2

TINY = find_model("tiny")
TEXT = "It is a truth universally acknowledged, that a wife"


@pytest.fixture(scope="module")
def tiny() -> LFM2:
    return lfm2kit.load_model(TINY, "reference")


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.array(load_tokenizer(TINY).encode(TEXT), np.int32)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def logprobs_of(model: LFM2, ids: np.ndarray, some: list[Window]) -> list[float]:
    """Return the logprobs of the scored tokens, each from a sequence of its own that ends there."""
    scored = [(one.begin, token) for one in some for token in range(one.first, one.end)]
    prefixes = lfm2kit.Batch.of_sequences([ids[begin:token] for begin, token in scored])
    logits = model.logits(prefixes).astype(np.float64)
    sums = np.log(np.exp(logits).sum(axis=1))
    return [
        row[ids[token]] - total for row, total, (_, token) in zip(logits, sums, scored, strict=True)
    ]


# ---- windows ----


def test_windows_are_those_of_the_documentation() -> None:
    assert list(windows(10, 4, 2)) == [(0, 1, 4), (2, 4, 6), (4, 6, 8), (6, 8, 10)]
    assert list(windows(10, 4, 3)) == [(0, 1, 4), (3, 4, 7), (6, 7, 10)]
    assert list(windows(10, 99, 50)) == [(0, 1, 10)]
    assert list(windows(2, 2, 1)) == [(0, 1, 2)]


@pytest.mark.parametrize("size", [2, 3, 8, 31])
@pytest.mark.parametrize("tokens", [2, 3, 30, 31, 32, 33, 100])
def test_every_token_but_the_first_is_scored_once_after_enough_others(
    tokens: int, size: int
) -> None:
    for stride in range(1, size):
        some = list(windows(tokens, size, stride))
        assert [t for one in some for t in range(one.first, one.end)] == list(range(1, tokens))
        for one in some:
            assert one.end - one.begin <= size
            assert one.first - one.begin >= min(one.first, size - stride)


def test_a_batch_asks_for_the_logits_before_the_scored_tokens() -> None:
    ids = np.arange(50, 60, dtype=np.int32)
    batch = batch_of(ids, [Window(0, 1, 4), Window(2, 4, 6)])
    assert batch.token_ids.tolist() == [50, 51, 52, 53, 52, 53, 54, 55]
    assert batch.logits_rows.tolist() == [0, 1, 2, 5, 6]


# ---- scores ----


@pytest.mark.parametrize(("size", "stride"), [(512, 256), (9, 4), (4, 3)])
def test_logprobs_are_those_of_a_forward_for_each_token(
    tiny: LFM2, ids: np.ndarray, size: int, stride: int
) -> None:
    some = list(windows(len(ids), size, stride))
    got = score([tiny], ids, some, at_once=3)
    want = logprobs_of(tiny, ids, some)
    np.testing.assert_allclose(got.logprobs, want, rtol=1e-12, atol=1e-13)  # both in float64
    assert np.isnan(got.divergences).all()


def test_scores_do_not_depend_on_how_many_windows_are_computed_together(
    tiny: LFM2, ids: np.ndarray
) -> None:
    some = list(windows(len(ids), 12, 5))
    one, *others = (score([tiny], ids, some, at_once).logprobs for at_once in (1, 2, 99))
    assert all(np.array_equal(one, other) for other in others)


def test_as_many_windows_are_computed_together_as_have_room_for_their_logits() -> None:
    assert windows_at_once([Window(0, 1, 512), Window(256, 512, 768)], 65536) == 1
    assert windows_at_once([Window(0, 1, 257)], 2048) == 64
    assert windows_at_once([Window(0, 1, 2**20)], 2**16) == 1


@pytest.mark.parametrize("at_once", [1, 2, 3, 99])
@pytest.mark.parametrize("stride", [1, 3, 6])
def test_no_batch_is_larger_than_the_first(stride: int, at_once: int) -> None:
    some = list(windows(40, 7, stride))
    work = Work(Text(np.arange(40, dtype=np.int32), 40), 7, stride, some, at_once)
    groups = [some[i : i + at_once] for i in range(0, len(some), at_once)]
    batches = [batch_of(work.text.ids, group) for group in groups]
    assert work.most_tokens == max(len(batch.token_ids) for batch in batches)
    assert work.most_rows == max(len(batch.logits_rows) for batch in batches)


class Says:
    """A model whose logits are the same after every token."""

    def __init__(self, *probabilities: float) -> None:
        with np.errstate(divide="ignore"):
            self.row = np.log(np.array(probabilities, np.float32)) + np.float32(3)

    def logits(self, batch: lfm2kit.Batch) -> Any:
        return np.tile(self.row, (len(batch.logits_rows), 1))


def scores_of(*models: Any) -> Any:
    return score(models, np.array([0, 1, 2, 2], np.int32), [Window(0, 1, 4)], 1)


def test_the_divergence_is_from_the_other_model_and_not_to_it() -> None:
    p, q = (0.5, 0.25, 0.25), (0.25, 0.5, 0.25)
    got = scores_of(Says(*q), Says(*p))
    np.testing.assert_allclose(got.logprobs, np.log([0.5, 0.25, 0.25]), rtol=1e-6)
    np.testing.assert_allclose(got.base_logprobs, np.log([0.25, 0.25, 0.25]), rtol=1e-6)
    wanted = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    np.testing.assert_allclose(got.divergences, wanted, rtol=1e-6)
    assert got.agreements.tolist() == [0, 0, 0]
    far = (0.9, 0.05, 0.05)
    assert not np.isclose(scores_of(Says(*far), Says(*p)).divergences[0], wanted)
    assert scores_of(Says(*far), Says(*p)).agreements.tolist() == [1, 1, 1]


def test_a_model_differs_from_itself_by_nothing(tiny: LFM2, ids: np.ndarray) -> None:
    got = score([tiny, tiny], ids, list(windows(len(ids), 20, 10)), 2)
    assert np.array_equal(got.logprobs, got.base_logprobs)
    assert not got.divergences.any()
    assert got.agreements.all()


def test_logits_that_are_not_finite_name_the_token() -> None:
    with pytest.raises(lfm2kit.Lfm2kitError, match=r"^token 1 of the text: the model's logits"):
        scores_of(Says(0.5, 0.5, 0))


# ---- the command ----


def test_the_record_has_the_figures_of_the_text(
    tiny: LFM2, ids: np.ndarray, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    perplexity(text, backend="reference", against="reference", json="-")
    captured = capsys.readouterr()
    record = json.loads(captured.out)
    figures = {one["name"]: one["values"][0] for one in record["figures"]}
    logprobs = logprobs_of(tiny, ids, [Window(0, 1, len(ids))])
    assert figures["perplexity"] == pytest.approx(math.exp(-np.mean(logprobs)), rel=1e-9)
    assert ids[0] == load_tokenizer(TINY).id_of("bos_token")  # so all bytes are predicted
    bits = -np.sum(logprobs) / math.log(2) / len(TEXT.encode())
    assert figures["bits per byte"] == pytest.approx(bits, rel=1e-9)
    assert (figures["mean KL divergence"], figures["same best token"]) == (0, 1)
    assert (record["tokens"], record["window"], record["stride"]) == (len(ids) - 1, 512, 256)
    assert record["against"]["backend"] == record["backend"] == "reference"
    assert "bits per byte:" in captured.err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "the file is empty"),
        (b"\x80\x81", r"not UTF-8: byte 0x80 at 0 \(invalid start byte\); give a text"),
    ],
)
def test_what_is_no_text_is_one_line(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(lfm2kit.Lfm2kitError, match=rf"text\.txt: {said}"):
        perplexity(tmp_path / "text.txt", backend="reference")


def test_a_path_without_a_text_is_one_line(tmp_path: Path) -> None:
    for path, said in ((tmp_path, "directory"), (tmp_path / "no.txt", "No such file")):
        with pytest.raises(lfm2kit.Lfm2kitError, match=f"^{path}: .*{said}"):
            perplexity(path, backend="reference")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"window": 128001}, "window=128001: the model's context has 128000 tokens"),
        ({"window": 1}, "window=1: expected 2 tokens or more"),
        ({"window": 8, "stride": 8}, "stride=8: expected a number from 1 to 7"),
        ({"stride": 0}, "stride=0: expected a number from 1 to 511"),
        ({"against": "nothing"}, "unknown backend 'nothing'"),
        ({"against_model": "nowhere"}, "nowhere"),
    ],
)
def test_wrong_options_are_named(text: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(lfm2kit.Lfm2kitError, match=said):
        perplexity(text, backend="reference", **options)


def test_a_record_cannot_replace_the_text(text: Path) -> None:
    with pytest.raises(lfm2kit.Lfm2kitError, match="the text"):
        perplexity(text, backend="reference", json=str(text))
    assert text.read_text() == TEXT


def test_a_model_without_a_tokenizer_is_one_line(text: Path, tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    with pytest.raises(lfm2kit.Lfm2kitError, match=r"has no tokenizer\.json"):
        perplexity(text, model=str(tmp_path / "model"), backend="reference")


SMALL = """
tie_word_embeddings = true
vocab_size = 64
hidden_size = 16
eps = 1e-05

[[layers]]
operator = { type = "ShortConv", kernel_size = 3, bias = false }
feed_forward = { type = "MLP", intermediate_size = 8 }
"""


def test_models_of_other_vocabularies_are_not_compared(text: Path, tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(SMALL)
    with pytest.raises(lfm2kit.Lfm2kitError, match=r"tiny has 2048 tokens, .*small\.toml 64"):
        perplexity(text, backend="reference", against_model=str(tmp_path / "small.toml"))


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Return a folder of the same model."""
    return Path(shutil.copytree(TINY, tmp_path / "other"))


def test_models_of_other_tokenizers_are_not_compared(
    text: Path, other: Path, ids: np.ndarray
) -> None:
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    names = {number: name for name, number in vocabulary.items()}
    one, another = names[ids[3]], names[max(names)]
    vocabulary[one], vocabulary[another] = vocabulary[another], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(content))
    place = ids.tolist().index(ids[3])
    with pytest.raises(lfm2kit.Lfm2kitError, match=rf"different tokens of it, from token {place} "):
        perplexity(text, backend="reference", against_model=str(other))


@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_models_of_the_same_tokenizer_or_of_none_are_compared(
    text: Path, other: Path, has_tokenizer: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    if not has_tokenizer:
        (other / "tokenizer.json").unlink()
    perplexity(text, backend="reference", against_model=str(other))
    assert "mean KL divergence:  0.000000" in capsys.readouterr().out


def test_what_does_not_fit_is_refused_before_it_is_built(
    text: Path, ids: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two models, and the logits of a batch, count together."""
    options = Options(model="tiny", backend="reference")
    setup = set_up(open_model(options), options)
    of_one = setup.sizes.needed(setup.placed, "host", len(ids))
    kept, logits = of_one.kept, 4 * (len(ids) - 1) * setup.checkpoint.spec.embed_tokens.vocab_size

    monkeypatch.setattr(Setup, "build", None)

    def refusal(free: int) -> str:
        monkeypatch.setattr(type(HOST), "free_bytes", lambda self, ranks=1: free)
        with pytest.raises(lfm2kit.Lfm2kitError) as caught:
            perplexity(text, backend="reference", against="reference")
        return str(caught.value)

    assert "the model needs" in refusal(kept - 1)
    assert "the comparison of two models needs" in refusal(2 * kept - 1)
    too_small = refusal(2 * kept + of_one.scratch + 2 * logits - 1)
    assert f"scoring {len(ids)} tokens at once needs" in too_small
    assert too_small.endswith("give a smaller window")
