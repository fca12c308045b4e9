"""What rows ask of a sampler, as arrays: for kernels that draw the tokens of all rows.

A record says of which row of the logits it is, how many ids, biases and mask words are its own, and
where they begin in the arrays of all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from struct import Struct
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lfm2kit.engine.drawing import Row

# Numbers of `Sampling`; how many ids, in this order, biases and words a row has; where they begin.
NUMBERS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
COUNTS = ("prompt", "generated", "forbidden", "biases", "words")
PLACES = ("row", "first_id", "first_bias", "first_word")
RECORD = np.dtype(
    [
        *((name, np.float64) for name in NUMBERS),
        *((name, np.int64) for name in ("top_k", *COUNTS)),
        ("is_masked", np.int64),
        ("seed", np.uint64),
        ("position", np.uint64),
        *((name, np.int64) for name in PLACES),
    ],
)
_numbers = attrgetter(*NUMBERS, "top_k")  # of a `Sampling`, as a tuple
_record = Struct("=6d7q2Q4q").pack  # a RECORD, which NumPy takes longer to make
NO_IDS, NO_WORDS = np.zeros(0, np.int32), np.zeros(0, np.uint32)


class Asked(NamedTuple):
    """The records of rows, and what they count."""

    records: npt.NDArray[np.void]  # RECORD [rows that are not None]
    ids: npt.NDArray[np.int32]  # of each row: of its prompt, generated, forbidden, with a bias
    biases: npt.NDArray[np.float32]
    words: npt.NDArray[np.uint32]  # of the masks


def asked_by(rows: Sequence[Row | None]) -> Asked:
    """Return what rows ask, without those that are None, and without ids that no penalty counts."""
    records, ids, biases, words = bytearray(), [NO_IDS], list[float](), [NO_WORDS]
    first_id = first_word = 0
    for place, row in enumerate(rows):
        if row is None:
            continue
        sampling, bias = row.sampling, row.sampling.logit_bias
        repeats = sampling.repetition_penalty != 1
        counts = repeats or sampling.presence_penalty != 0 or sampling.frequency_penalty != 0
        prompt = row.prompt if repeats else NO_IDS
        generated = row.generated if counts else NO_IDS
        mask = NO_WORDS if row.mask is None else row.mask
        records += _record(
            *_numbers(sampling),
            len(prompt),
            len(generated),
            len(row.forbidden),
            len(bias),
            len(mask),
            row.mask is not None,
            row.seed,
            row.position,
            place,
            first_id,
            len(biases),
            first_word,
        )
        ids += [prompt, generated]
        if row.forbidden or bias:
            ids.append(np.array([*row.forbidden, *bias], np.int32))
            biases += bias.values()
        if len(mask):
            words.append(mask)
        first_id += len(prompt) + len(generated) + len(row.forbidden) + len(bias)
        first_word += len(mask)
    return Asked(
        np.frombuffer(records, RECORD),
        np.concatenate(ids),
        np.array(biases, np.float32),
        np.concatenate(words),
    )
