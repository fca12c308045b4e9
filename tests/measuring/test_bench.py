"""What `bench` measures: decoding, the least work of it, and the time that a thread waited."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lfm2kit import specs
from lfm2kit.backend import Ceilings
from lfm2kit.batch import Batch
from lfm2kit.building.loading import set_up
from lfm2kit.building.options import Options
from lfm2kit.engine.guesses import RepeatedText
from lfm2kit.measuring import decoding, given_texts
from lfm2kit.measuring.bench import Contender, Measured, decodings
from lfm2kit.measuring.timing import Timing
from lfm2kit.specs import Work
from lfm2kit.state import STEP_BACK, Room
from tests.random_model import RANDOM


def test_decoding_goes_on_from_a_context_that_is_computed_in_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decoding, "PROMPT_TOKENS", 8)
    model = set_up(RANDOM, Options(backend="reference")).build()
    batches: list[Batch] = []

    def logits(batch: Batch, state: Any) -> Any:
        batches.append(batch)
        return model.logits(batch, state)

    recorded: Any = SimpleNamespace(spec=model.spec, new_state=model.new_state, logits=logits)
    decoder = decoding.Decoder(recorded, sequences=2, context=9, steps=2, seed=0)
    decoder.step()
    last = decoder.step()
    assert [batch.tokens for batch in batches] == [8, 8, 2, 2, 2]
    assert decoding.most_tokens([2], [9], ["none"]) == 8
    whole = np.concatenate([batch.token_ids.reshape(2, -1) for batch in batches], axis=1)
    np.testing.assert_array_equal(last, model.logits(Batch.of_sequences(list(whole))))


def test_texts_of_guesses_repeat_themselves_so_that_each_step_adds_all_that_it_computes() -> None:
    model = set_up(RANDOM, Options(backend="reference")).build()
    decoder = decoding.Decoder(model, 2, context=17, steps=3, seed=0, speculate="ngram")
    assert decoding.most_tokens([2], [17], ["none", "ngram"]) == 34
    ids = []
    for step in range(3):
        assert decoder.tokens == 2 * (17 + 8 * step)
        ids.append(decoder.next_batch().token_ids.reshape(2, 8))
        logits = decoder.step()
        assert len(logits) == 16
    (first, second), (text, _) = ids[0], np.concatenate(ids, axis=1)
    assert len(set(first.tolist())) == 8
    assert first.tolist() != second.tolist()
    np.testing.assert_array_equal(text[8:], text[:-8])


@pytest.mark.parametrize(("wrong", "grown"), [(0, 1), (2, 3), (5, 6)])
def test_a_text_grows_by_the_guesses_before_the_first_wrong_one(
    wrong: int, grown: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(RepeatedText):
        def guess(self, ids: Any, most: int) -> list[int]:
            guessed = super().guess(ids, 5)
            return [(one + (i == wrong)) % 2048 for i, one in enumerate(guessed)]

    monkeypatch.setitem(given_texts.GUESSES, "wrong", Wrong)
    text = given_texts.GivenText("wrong", 16, 100, 2048, np.random.default_rng(0))
    text.read(16)
    assert len(text.next()) == 6
    text.advance()
    assert text.length == 16 + grown


def test_a_step_reads_all_keys_and_values_and_what_convolutions_look_back_to() -> None:
    tokens, room = 100, Room(pages=1)
    setup = set_up(RANDOM, Options(backend="reference"))
    model = setup.build()
    (contender,) = decodings(setup, model, [3], [tokens], ["ngram"], 1, seed=0)
    batch = Batch.of_sequences([[0] * 8] * 3, starts=[tokens] * 3)
    all_rows = replace(batch, logits_rows=np.arange(24, dtype=np.int32))
    itemsize = setup.stored_bytes(setup.placed) / model.spec.weight_elements()
    weights = model.spec.work(all_rows, itemsize)
    state = 0.0
    for leaf in model.placed.leaves():
        kept = setup.sizes.state(leaf, room)
        if isinstance(leaf.spec, specs.Attention):
            state += kept * tokens / room.page_tokens
        elif isinstance(leaf.spec, specs.ShortConv):
            state += kept * 2 / (2 + STEP_BACK)  # its kernel has 3 taps
    assert contender.tokens == 24
    assert contender.work.bytes == pytest.approx(weights.bytes + 3 * state)


@pytest.mark.parametrize(("tokens", "read"), [(0, 0), (1, 4), (3, 9.25), (1000, 16)])
def test_the_bytes_of_experts_are_those_that_tokens_choose_at_random(
    tokens: int, read: float
) -> None:
    """A token takes 4 of 16 experts, so three tokens leave 16 * (3 / 4) ** 3 unread on average."""
    experts = specs.Experts(8, 6, 16, 4, tuple(range(16)))
    batch = Batch.of_sequences([[0]] * tokens)
    weights = experts.work(batch, itemsize=2).bytes - 8 * tokens * experts.hidden_size
    assert weights == pytest.approx(2 * read * experts.expert.weight_elements())
    half = specs.Experts(8, 6, 16, 4, tuple(range(8)))
    assert half.work(batch, 2).bytes == pytest.approx(weights / 2 + 8 * tokens * 8)


def measured(*timings: Timing, ceilings: Ceilings | None = None) -> Measured:
    contender = Contender("any", "fp32", "a test", 1, 1, Work(6, 8), lambda: None)
    return Measured(contender, timings, ceilings)


def waiting(*timings: Timing) -> float | None:
    return measured(*timings).waiting


def test_shares_are_of_the_ceilings_that_a_backend_measures() -> None:
    slow_memory = measured(Timing(4, None), ceilings=Ceilings(flops=6, bytes=4))
    assert (slow_memory.memory_share, slow_memory.roofline) == (0.5, 0.5)
    slow_processor = measured(Timing(4, None), ceilings=Ceilings(flops=2, bytes=4))
    assert (slow_processor.memory_share, slow_processor.roofline) == (0.5, 0.75)
    unknown = measured(Timing(4, None))
    assert (unknown.memory_share, unknown.roofline) == (None, None)


def test_waiting_is_the_median_share_of_the_calls_of_which_it_is_known() -> None:
    assert waiting(Timing(2, 0.5), Timing(1, 0.9), Timing(4, 0)) == 0.25
    assert waiting(Timing(2, None), Timing(2, 1)) == 0.5
    assert waiting(Timing(2, None)) is None
