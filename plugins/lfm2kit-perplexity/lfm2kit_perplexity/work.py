"""What there is to score: a text that is the same tokens to all models, in windows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from lfm2kit.chat.tokenizer import FILE, load_tokenizer
from lfm2kit.checkpoint import Checkpoint
from lfm2kit.engine.room import context_of
from lfm2kit.errors import Lfm2kitError
from lfm2kit_perplexity.scoring import windows_at_once
from lfm2kit_perplexity.text import Text, tokenized
from lfm2kit_perplexity.windows import Window, check_sizes, windows

WINDOW = 512  # tokens, as in llama.cpp's llama-perplexity


class Work(NamedTuple):
    """A text in windows, and how many of these are computed together."""

    text: Text
    size: int
    stride: int
    windows: list[Window]
    at_once: int

    @property
    def most_tokens(self) -> int:
        """Return the tokens of the largest batch."""
        return sum(one.end - one.begin for one in self._largest)

    @property
    def most_rows(self) -> int:
        """Return the rows of logits of the largest batch."""
        return sum(one.end - one.first for one in self._largest)

    @property
    def _largest(self) -> list[Window]:
        """Return the windows of the first batch.

        Only the last window may be shorter, and in none are more tokens scored than in the first.
        """
        return self.windows[: self.at_once]


def work_of(
    path: Path, checkpoints: Sequence[Checkpoint], window: int | None, stride: int | None
) -> Work:
    """Return the work; raise `Lfm2kitError` for a text or a window that the models cannot take."""
    vocab_size = _common_vocab_size(checkpoints)
    text = _common_text(path, checkpoints)
    context = min(context_of(one.spec) for one in checkpoints)
    size = min(WINDOW, context) if window is None else window
    stride = max(1, size // 2) if stride is None else stride
    check_sizes(size, stride, context)
    some = list(windows(len(text.ids), size, stride))
    return Work(text, size, stride, some, windows_at_once(some, vocab_size))


def _common_vocab_size(checkpoints: Sequence[Checkpoint]) -> int:
    """Return the rows of all embeddings; raise `Lfm2kitError` if their numbers differ."""
    sizes = [one.spec.embed_tokens.vocab_size for one in checkpoints]
    if len(set(sizes)) > 1:
        one, other = (each.path for each in checkpoints)
        raise Lfm2kitError(
            f"{one} has {sizes[0]} tokens, {other} {sizes[1]}: models of different vocabularies "
            "cannot be compared token by token"
        )
    return sizes[0]


def _common_text(path: Path, checkpoints: Sequence[Checkpoint]) -> Text:
    """Return the tokens of the first model, which are those of others that have a tokenizer."""
    first, *others = dict.fromkeys(one.folder for one in checkpoints)
    tokenizer = load_tokenizer(first)
    tokenizer.check_fits(checkpoints[0].spec.embed_tokens.vocab_size)
    text = tokenized(path, tokenizer)
    for folder in others:
        if (folder / FILE).exists():
            other = load_tokenizer(folder)
            _check_same(path, (tokenizer.path, text), (other.path, tokenized(path, other)))
    return text


def _check_same(path: Path, one: tuple[Path, Text], other: tuple[Path, Text]) -> None:
    """Raise `Lfm2kitError` if two tokenizers make other tokens of a text."""
    pairs = enumerate(zip_longest(one[1].ids.tolist(), other[1].ids.tolist()))
    place = next((at for at, (left, right) in pairs if left != right), None)
    if place is not None:
        raise Lfm2kitError(
            f"{path}: {one[0]} and {other[0]} make different tokens of it, from token {place} on; "
            "models of different tokenizers cannot be compared token by token"
        )
