"""A text as token ids, and how many bytes of it the scored ones stand for."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from lfm2kit import bounds
from lfm2kit.chat.tokenizer import Tokenizer
from lfm2kit.checkpoint.file_kinds import check_regular
from lfm2kit.errors import Lfm2kitError
from lfm2kit_perplexity.windows import Int32


class Text(NamedTuple):
    """A text's token ids, the BOS of its tokenizer first, and the bytes of all but the first id."""

    ids: Int32
    bytes: int


def read(path: Path) -> str:
    """Return a file's text; raise `Lfm2kitError` if it is empty, too long, or not UTF-8."""
    size = check_regular(path)
    if not size:
        raise Lfm2kitError(f"{path}: the file is empty; give a text")
    if size > bounds.TEXT:
        raise Lfm2kitError(f"{path}: {size} bytes; lfm2kit tokenizes up to {bounds.TEXT} at once")
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise Lfm2kitError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise Lfm2kitError(
            f"{path}: not UTF-8: byte 0x{byte:02x} at {error.start} ({error.reason}); give a text"
        ) from None


def tokenized(path: Path, tokenizer: Tokenizer) -> Text:
    """Return the tokens of a file; raise `Lfm2kitError` if there are fewer than two.

    The first token has none before it, and so no probability.  Where it is no BOS, its bytes are
    not predicted by the model and do not count.
    """
    text = read(path)
    ids = tokenizer.encode(text)
    if len(ids) < 2:
        raise Lfm2kitError(f"{path}: {len(ids)} token; give a text of two or more")
    is_bos = ids[0] == tokenizer.id_of("bos_token")
    unpredicted = 0 if is_bos else len(tokenizer.token_bytes(ids[0]))
    return Text(np.array(ids, np.int32), len(text.encode()) - unpredicted)
