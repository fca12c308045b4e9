"""Folders with the tokenizer and templates of tests/chat/golden."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from lfm2kit.chat.tokenizer import Tokenizer, load_tokenizer

GOLDEN = Path(__file__).parent / "golden"


@cache
def golden_tokenizer() -> Tokenizer:
    return load_tokenizer(GOLDEN)


def folder_with(folder: Path, template: str | None = None, **config: Any) -> Path:
    """Return `folder` with the golden tokenizer, a template file and changed fields."""
    fields = json.loads((GOLDEN / "tokenizer_config.json").read_text()) | config
    (folder / "tokenizer.json").write_bytes((GOLDEN / "tokenizer.json").read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder
