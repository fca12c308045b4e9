"""Streams: the text of one decode, characters as soon as they are certain, and stop strings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Inner

from lfm2kit.chat.matching import Finder
from lfm2kit.chat.streaming import TextStream
from lfm2kit.chat.tokenizer import Tokenizer
from lfm2kit.chat.tokenizer_config import read_tokenizer_config
from lfm2kit.chat.tool_calls import TAGS
from lfm2kit.errors import Lfm2kitError
from tests.chat.folders import golden_tokenizer

few = settings(max_examples=150, deadline=None)
GRIN = "\N{GRINNING FACE}"
NO_TEXT = "∅"  # a token that the decoder takes away


def _tokenizer(vocabulary: Sequence[str], decoder: decoders.Decoder | None) -> Tokenizer:
    inner = Inner(models.WordLevel({piece: i for i, piece in enumerate(vocabulary)}, vocabulary[0]))
    if decoder is not None:
        inner.decoder = decoder
    return Tokenizer(Path("tokenizer.json"), inner, read_tokenizer_config(Path("nosuch")))


BYTES = [f"<0x{byte:02X}>" for byte in (*GRIN.encode(), *b"a\xff\xc3\xa9")]
DECODERS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": golden_tokenizer,
    "byte fallback": lambda: _tokenizer(
        ["▁", "▁the", "a", "▁▁", "é", NO_TEXT, *BYTES],
        decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.Replace(NO_TEXT, ""),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        ),
    ),
    "metaspace": lambda: _tokenizer(["▁", "▁the", "a", "▁▁", "é"], decoders.Metaspace()),
    "word pieces": lambda: _tokenizer(["un", "##able", "n't", ".", "?"], decoders.WordPiece()),
    "none": lambda: _tokenizer(["a", "b", "c"], None),
}


@cache
def tokenizer_of(decoder: str) -> Tokenizer:
    return DECODERS[decoder]()


def streamed(stream: TextStream, ids: Sequence[int], cuts: Iterable[int]) -> list[str]:
    """Return the pieces for `ids`, cut into calls, and the last piece."""
    ends = [*sorted({cut % (len(ids) + 1) for cut in cuts}), len(ids)]
    starts = [0, *ends]
    pieces = [stream.push(ids[a:b]) for a, b in zip(starts, ends, strict=False)]
    return [*pieces, stream.finish()]


CUTS = st.lists(st.integers(0, 40), max_size=8)


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("decoder", DECODERS)
def test_pieces_are_the_text_of_one_decode(decoder: str, special: bool) -> None:
    tokenizer = tokenizer_of(decoder)
    numbers = st.integers(0, tokenizer.size + 1)  # unknown ones too

    @few
    @given(st.lists(numbers, max_size=30), CUTS)
    def check(ids: list[int], cuts: list[int]) -> None:
        stream = TextStream(tokenizer, special=special)
        assert "".join(streamed(stream, ids, cuts)) == tokenizer.decode(ids, special=special)

    check()


def test_tokens_that_are_written_in_characters_of_the_byte_alphabet_are_decoded_alike() -> None:
    """The library takes added tokens for bytes where it can."""
    inner = Inner.from_str(golden_tokenizer()._inner.to_str())
    inner.add_tokens([AddedToken("é"), AddedToken("日本"), AddedToken("Ġx")])
    config = golden_tokenizer().config
    tokenizer = Tokenizer(Path("tokenizer.json"), inner, config)
    ids = [tokenizer.size - 3, tokenizer.size - 2, tokenizer.size - 1]
    assert "".join(streamed(TextStream(tokenizer), ids, [1, 2])) == tokenizer.decode(ids)


def byte_ids(data: bytes) -> list[int]:
    """Return one id for each byte, by the golden vocabulary."""
    tokenizer = golden_tokenizer()
    by_byte = {tokenizer.token_bytes(i): i for i in range(tokenizer.size)}
    return [by_byte[bytes([byte])] for byte in data]


def certain(data: bytes) -> str:
    """Return the text that `data` begins with, whatever follows: the definition."""
    ends = (b"", b"a", b"\x80\x80\x80", b"\x90\x80\x80", b"\xa0\x80")
    texts = [(data + end).decode(errors="replace") for end in ends]
    length = 0
    while all(len(text) > length and text[length] == texts[0][length] for text in texts):
        length += 1
    return texts[0][:length]


ODD_BYTES = st.sampled_from([*GRIN.encode(), *b"a\xed\xa0\x80\xbf\xe0\xc3\xa9\xf4\x90\xff\xc0\xef"])


@few
@given(st.lists(ODD_BYTES, max_size=12))
@example([0xED, 0xA0])
@example([0xED, 0xA0, 0x80])
@example([0xF4, 0x90])
@example(list(GRIN.encode()))
@example([0xEF, 0xBF, 0xBD])  # U+FFFD itself
def test_each_character_comes_as_soon_as_it_is_certain(data: list[int]) -> None:
    stream, shown = TextStream(golden_tokenizer()), ""
    for end, number in enumerate(byte_ids(bytes(data)), 1):
        shown += stream.push([number])
        assert shown == certain(bytes(data[:end]))
    assert shown + stream.finish() == bytes(data).decode(errors="replace")


STRINGS = st.text("ab", min_size=1, max_size=4)


def first_complete(text: str, stop: Iterable[str]) -> tuple[str, str | None]:
    """Return the text before the stop string that is complete first, and that string."""
    for end in range(len(text) + 1):
        complete = [string for string in stop if text[:end].endswith(string)]
        if complete:
            string = max(complete, key=len)
            return text[: end - len(string)], string
    return text, None


@settings(max_examples=300, deadline=None)
@given(st.text("ab", max_size=20), st.lists(STRINGS, max_size=3), CUTS)
@example("aab", ["aaab", "ab"], [1, 2])
@example("abc", ["b", "abc"], [])
@example("aab", ["b", "ab"], [])
def test_a_stop_string_ends_the_text_wherever_it_is_cut(
    text: str, stop: list[str], cuts: list[int]
) -> None:
    stream = TextStream(golden_tokenizer(), stop)
    pieces = streamed(stream, byte_ids(text.encode()), cuts)
    assert ("".join(pieces), stream.stopped) == first_complete(text, stop)


@settings(max_examples=150, deadline=None)
@given(st.text("ab", max_size=12), st.lists(STRINGS, min_size=1, max_size=3))
def test_only_what_may_begin_a_stop_string_is_held_back(text: str, stop: list[str]) -> None:
    stream, shown = TextStream(golden_tokenizer(), stop), ""
    beginnings = [string[:n] for string in stop for n in range(1, len(string))]
    for end, number in enumerate(byte_ids(text.encode()), 1):
        shown += stream.push([number])
        if stream.stopped:
            break
        held = max((len(b) for b in beginnings if text[:end].endswith(b)), default=0)
        assert shown == text[: end - held]


def test_named_special_tokens_are_part_of_the_text() -> None:
    tokenizer = golden_tokenizer()
    ids = tokenizer.encode("<|tool_call_start|>[f()]<|tool_call_end|>a<|im_end|>", special=True)
    stream = TextStream(tokenizer, special=TAGS)
    assert stream.push(ids) + stream.finish() == "<|tool_call_start|>[f()]<|tool_call_end|>a"


def test_a_stop_string_may_contain_characters_of_several_bytes() -> None:
    stream = TextStream(golden_tokenizer(), [f"é{GRIN}"])
    pieces = [stream.push([i]) for i in byte_ids(f"aé{GRIN}b".encode())]
    assert "".join(pieces) == "a"
    assert stream.stopped == f"é{GRIN}"
    assert stream.push(byte_ids(b"c")) == stream.finish() == ""


def test_text_that_only_begins_a_stop_string_is_given_at_the_end() -> None:
    stream = TextStream(golden_tokenizer(), ["abc"])
    assert [stream.push(byte_ids(b"xab")), stream.finish()] == ["x", "ab"]
    assert stream.stopped is None


@pytest.mark.parametrize("stop", ["a", [""], ["a", ""]])
def test_stop_strings_that_mean_nothing_are_one_line(stop: str | list[str]) -> None:
    with pytest.raises(Lfm2kitError, match="stop strings are a list"):
        TextStream(golden_tokenizer(), stop)


class Counting(str):
    """A string that counts how often its characters are looked at."""

    looks = 0

    def __getitem__(self, key: object) -> str:
        Counting.looks += 1
        return super().__getitem__(key)  # type: ignore[index]


def test_a_search_looks_at_few_characters_for_each_of_the_text() -> None:
    Counting.looks = 0
    finder = Finder([Counting("a" * 100 + "b")])
    built = Counting.looks
    for _ in range(2000):
        assert finder.feed("a").string is None
    assert Counting.looks - built <= 4 * 2000


@pytest.mark.parametrize("decoder", ["byte level", "byte fallback", "metaspace"])
def test_a_stream_decodes_few_ids_for_each_of_its_own(
    decoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, decoded = tokenizer_of(decoder), []
    decode = tokenizer.decode
    monkeypatch.setattr(
        tokenizer, "decode", lambda ids, **how: decoded.append(len(ids)) or decode(ids, **how)
    )
    runs = [i for i in range(min(tokenizer.size, 20)) if tokenizer.piece(i) != NO_TEXT]
    for number in runs:  # of bytes, spaces, letters
        stream = TextStream(tokenizer)
        for _ in range(300):
            stream.push([number])
        stream.finish()
        assert sum(decoded) <= 300 * 12
        decoded.clear()
