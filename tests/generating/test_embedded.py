"""The embedded model is a trained one: it expects English, and needs no option to write it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lfm2kit import Batch, load_model
from lfm2kit.building.loading import find_model
from lfm2kit.measuring import samples
from tests.checkpoint.typed import Cli


def test_it_expects_the_words_of_sentences_that_it_has_not_seen() -> None:
    """3.1 nats a token; without training it would be 7.6."""
    ids = samples.read_inputs(find_model("tiny") / "inputs.bin")[:32]
    batch = Batch.of_sequences(list(ids))
    every_row = replace(batch, logits_rows=np.arange(ids.size, dtype=np.int32))
    logits = load_model("tiny", "reference").logits(every_row).reshape(*ids.shape, -1)[:, :-1]
    chosen = np.take_along_axis(logits, ids[:, 1:, None], axis=2)[..., 0]
    nats = np.log(np.exp(logits).sum(axis=2)) - chosen
    assert 2 < nats.mean() < 4


def test_generate_and_chat_need_no_other_model(cli: Cli) -> None:
    options = ("-b", "reference", "--max-tokens", 8, "--temperature", 0)
    for words in (("It is a truth",), ("Who are you?", "--chat")):
        text = cli("generate", *words, *options)
        assert text.code == 0
        assert len(text.out.split()) > 2


def test_its_tokenizer_puts_one_bos_before_a_text(cli: Cli) -> None:
    (first, *rest) = cli("tokenize", "It is a truth").out.splitlines()
    assert "<|startoftext|>" in first
    assert not any("<|" in line for line in rest)
