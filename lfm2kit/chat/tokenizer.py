"""Text to token ids and back, by a model folder's tokenizer.json and the library `tokenizers`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from lfm2kit import bounds
from lfm2kit.chat.byte_level import bytes_of_piece
from lfm2kit.chat.optional import library
from lfm2kit.chat.plain_text import PlainText
from lfm2kit.chat.tokenizer_config import TokenizerConfig, read_tokenizer_config
from lfm2kit.checkpoint.documents import read_bounded
from lfm2kit.checkpoint.hub_cache import name_of, to_download
from lfm2kit.checkpoint.names import CONFIG
from lfm2kit.errors import Lfm2kitError

if TYPE_CHECKING:
    import tokenizers

FILE = "tokenizer.json"


class Tokenizer:
    """The tokenizer of a model's folder; `load_tokenizer` makes it.

    Several threads may use it at the same time.
    """

    def __init__(self, path: Path, inner: tokenizers.Tokenizer, config: TokenizerConfig) -> None:
        self.path = path
        self.config = config
        self._inner = inner
        self._lock = Lock()  # whether text may have special tokens is a setting of `inner`
        added = inner.get_added_tokens_decoder()
        self.special = {number: token.content for number, token in added.items() if token.special}
        self._bos = self.id_of("bos_token")

    @cached_property
    def size(self) -> int:
        """Return one more than the largest id, which may be more than the number of tokens."""
        return max(self._inner.get_vocab().values(), default=-1) + 1

    def id_of(self, name: str) -> int | None:
        """Return the id of the token that is called `bos_token`, `eos_token`, and so on."""
        return self._inner.token_to_id(self.config.named.get(name, ""))

    @cached_property
    def plain_text(self) -> PlainText:
        return PlainText(self.special.values())

    def check_fits(self, vocab_size: int) -> None:
        """Raise `Lfm2kitError` if a model's embedding lacks a row for some id."""
        if self.size > vocab_size:
            raise Lfm2kitError(
                f"{self.path}: ids go up to {self.size - 1}, but the model's embedding has "
                f"{vocab_size} rows; this is another model's tokenizer"
            )

    def encode(self, text: str, *, special: bool = False, bos: bool = True) -> list[int]:
        """Return the ids of `text`.

        With `special`, a special token that is written out in `text` becomes its id; without, it is
        text like any other.  With `bos`, the ids begin with what the tokenizer puts before every
        text: one BOS, also if `text` has one already.
        """
        self._check(text)
        with self._lock, _blaming(self.path):
            self._inner.encode_special_tokens = not special
            ids: list[int] = self._inner.encode(text, add_special_tokens=bos).ids
        twice = self._bos is not None and ids[:2] == [self._bos, self._bos]
        return ids[1:] if bos and twice else ids

    def encode_parts(self, parts: Sequence[str]) -> list[int]:
        """Return the ids of text, special token, text, ..., text, without a BOS of their own."""
        ids: list[int] = []
        for position, part in enumerate(parts):
            ids += self.encode(part, special=position % 2 == 1, bos=False)
        return ids

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Return the text of `ids`, with or without special tokens; unknown ids have no text."""
        with _blaming(self.path):
            text: str = self._inner.decode(list(ids), skip_special_tokens=not special)
        return text

    def piece(self, number: int) -> str:
        """Return the vocabulary's name of an id; none if it has no such id."""
        return self._inner.id_to_token(number) or ""

    @cached_property
    def decoder(self) -> str:
        """Return the description of how pieces become text, in JSON."""
        decoder = self._inner.decoder
        return "null" if decoder is None else decoder.__getstate__().decode()

    @cached_property
    def description(self) -> str:
        """Return the tokenizer in JSON: its file, with the tokens of tokenizer_config.json."""
        with _blaming(self.path):
            text: str = self._inner.to_str()
        return text

    @cached_property
    def is_byte_level(self) -> bool:
        """Return whether a text's bytes are those of its tokens, one after the other."""
        decoder = json.loads(self.decoder)
        return isinstance(decoder, dict) and decoder.get("type") == "ByteLevel"

    def token_bytes(self, number: int) -> bytes:
        """Return the bytes of one token; of a tokenizer that has no bytes, its text's."""
        if self.is_byte_level:
            return bytes_of_piece(self.piece(number))
        return self.decode([number], special=True).encode()

    def _check(self, text: str) -> None:
        if len(text) > bounds.TEXT:
            raise Lfm2kitError(
                f"a text of {len(text)} characters; lfm2kit tokenizes up to {bounds.TEXT} at once"
            )
        check_encodable(text, "text")


def check_encodable(text: str, what: str) -> None:
    """Raise `Lfm2kitError`, which calls it `what`, if UTF-8 cannot say a character of `text`."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Lfm2kitError(
            f"the {what}'s character {error.start} is half of a surrogate pair, or was a byte that "
            "is not UTF-8; give UTF-8 text"
        ) from None


def load_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer of a model's folder.

    Raise `Lfm2kitError` if there is none, if it cannot be read, or if `tokenizers` is missing.
    """
    path = folder / FILE
    if not path.exists():
        raise Lfm2kitError(f"{folder} has no {FILE}, which text needs; {_advice(folder)}")
    config = read_tokenizer_config(folder)
    inner = _parsed(path, read_bounded(path, bounds.TOKENIZER))
    inner.no_truncation()
    inner.no_padding()
    with _blaming(config.path):
        _add_tokens(inner, config)
        _set_ends(inner, config)
    return Tokenizer(path, inner, config)


def _advice(folder: Path) -> str:
    """Say where to take a tokenizer from; repositories of GGUF files alone have none."""
    name = name_of(folder)
    is_whole = (folder / CONFIG).exists()
    return f"type '{to_download(name)}'" if name and is_whole else "copy it beside the model"


def _parsed(path: Path, content: bytes) -> tokenizers.Tokenizer:
    tokenizer: type[tokenizers.Tokenizer] = library("tokenizers").Tokenizer
    with _blaming(path):
        return tokenizer.from_buffer(content)


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """Turn whatever the library raises because of its file, panics included, into one line."""
    try:
        yield
    except Lfm2kitError:
        raise
    except BaseException as error:  # a panic is not an Exception
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            said = " ".join(str(error).split())
            raise Lfm2kitError(f"{path}: the library tokenizers cannot use it: {said}") from None
        raise


def _add_tokens(inner: tokenizers.Tokenizer, config: TokenizerConfig) -> None:
    """Add what tokenizer_config.json has beyond tokenizer.json, as transformers does.

    The library ignores those that are there.
    """
    token = library("tokenizers").AddedToken
    fields = {each["content"]: each for each in config.added}
    for content in config.named.values():
        fields.setdefault(content, {"content": content, "special": True, "normalized": False})
    inner.add_tokens([token(**each) for each in fields.values()])


def _set_ends(inner: tokenizers.Tokenizer, config: TokenizerConfig) -> None:
    """Let tokenizer_config.json say which tokens are put around a text, if it says so."""
    flags = [config.flag("add_bos_token"), config.flag("add_eos_token")]
    if flags == [None, None]:
        return
    bos, eos = (
        [config.named[name]] if flag and name in config.named else []
        for name, flag in zip(("bos_token", "eos_token"), flags, strict=True)
    )
    inner.post_processor = library("tokenizers.processors").TemplateProcessing(
        single=[*bos, "$A", *eos],
        special_tokens=[(token, inner.token_to_id(token)) for token in bos + eos],
    )
