"""`lfm2kit tokenize`: the ids of a text, each with the text that it stands for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lfm2kit.building.loading import find_model
from lfm2kit.building.options import About, Options
from lfm2kit.checkpoint.config import read_config
from lfm2kit.checkpoint.names import CONFIG
from lfm2kit.cli.options import JsonOption, flags
from lfm2kit.cli.report import Report
from lfm2kit.cli.text_input import text_of

if TYPE_CHECKING:
    from lfm2kit.chat.tokenizer import Tokenizer

MODEL: About = Options.__dataclass_fields__["model"].metadata["about"]


def tokenize(
    text: Annotated[str, typer.Argument(metavar="TEXT|-", help="A text; - reads stdin.")],
    model: Annotated[str, flags("model", MODEL)] = Options().model,
    special: Annotated[
        bool, typer.Option("--special", help="Take special tokens in the text for tokens.")
    ] = False,
    chat: Annotated[
        bool, typer.Option("--chat", help="Encode a chat in which a user says the text.")
    ] = False,
    json: JsonOption = None,
) -> None:
    """Show the token ids of a text, as the model's tokenizer makes them."""
    report = Report(json, "lfm2kit tokenize")
    tokenizer = _tokenizer_of(find_model(model))
    ids = _ids(tokenizer, text_of(text), special=special, chat=chat)
    report.fields = {"ids": ids, "tokens": [_described(tokenizer, number) for number in ids]}
    report.figure("tokens", "tokens", [len(ids)])
    for number in ids:
        report.line(f"{number:>8}  {_shown(tokenizer.token_bytes(number))}")
    report.write()


def _tokenizer_of(path: Path) -> Tokenizer:
    """Return the tokenizer beside a model's files, checked against its config.json."""
    from lfm2kit.chat.tokenizer import load_tokenizer  # here: no other command needs it

    folder = path if path.is_dir() else path.parent
    tokenizer = load_tokenizer(folder)
    if (folder / CONFIG).exists():
        tokenizer.check_fits(read_config(folder / CONFIG).vocab_size)
    return tokenizer


def _ids(tokenizer: Tokenizer, text: str, *, special: bool, chat: bool) -> list[int]:
    if not chat:
        return tokenizer.encode(text, special=special)
    from lfm2kit.chat.prompts import chat_ids
    from lfm2kit.chat.templates import load_template

    template = load_template(tokenizer.path.parent, tokenizer.config)
    messages = [{"role": "user", "content": text}]
    return chat_ids(tokenizer, template, messages, special=special)


def _described(tokenizer: Tokenizer, number: int) -> dict[str, Any]:
    content = tokenizer.token_bytes(number)
    return {
        "id": number,
        "text": content.decode(errors="replace"),
        "bytes": content.hex(),
        "special": number in tokenizer.special,
    }


def _shown(content: bytes) -> str:
    """Return a token's text in quotation marks; its bytes if it is part of a character."""
    try:
        return repr(content.decode())
    except UnicodeDecodeError:
        return repr(content)
