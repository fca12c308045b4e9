"""Chooses inputs for a trained checkpoint from held-out text, and makes their answers.

    python -m training.answers --model training/.model --data training/.data

Needs torch and transformers. Writes inputs.bin and answers.bin, in the assignment's format, beside
the weights, and completes the model card. The answers are transformers' logits in float64 (see
scripts/oracle.py), stored as float32.

An input is taken if rounding cannot decide anything: for no token are the last expert taken and the
first one not taken closer than 1e-4, nor are the two highest logits close.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lfm2kit.errors import Lfm2kitError
from lfm2kit.measuring import samples
from training import card
from training.commands import ended
from training.data import HELD_OUT, Part, read_data
from training.recipe import CONFIG

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

SAMPLES, LENGTH = 128, 16
LEAST_GAP = 1e-4  # between the biased scores of the last expert taken and the first one not
LEAST_MARGIN = 5e-3  # between the two highest logits


def beginnings(parts: Mapping[str, Part], length: int) -> npt.NDArray[np.int32]:
    """Return the BOS and the first tokens of held-out paragraphs, int32 [n, length], shuffled.

    Paragraphs that are shorter, and repeated beginnings, are left out.
    """
    found = []
    for name in HELD_OUT:
        part = parts[name]
        ends = np.append(part.starts[1:], len(part.ids))
        for start, end in zip(part.starts, ends, strict=True):
            if end - start > length:  # its last token may be a blank line
                found.append([CONFIG["bos_token_id"], *part.ids[start : start + length - 1]])
    unique = np.unique(np.array(found, dtype=np.int32), axis=0)
    return np.random.default_rng(0).permutation(unique)


def make_answers(folder: Path, parts: Mapping[str, Part]) -> None:
    """Write inputs.bin and answers.bin into a checkpoint's folder, and what they are into its card.

    Raise `Lfm2kitError` if too few paragraphs qualify.
    """
    from oracle import Oracle  # imports torch, which tests do without

    oracle = Oracle(folder)
    chosen, answers, gaps, margins, tried = [], [], [], [], 0
    for ids in beginnings(parts, LENGTH):
        tried += 1
        logits = oracle.logits(ids)[-1]
        second, first = np.sort(logits)[-2:]
        if oracle.least_gap >= LEAST_GAP and first - second >= LEAST_MARGIN:
            chosen.append(ids)
            answers.append(logits)
            gaps.append(oracle.least_gap)
            margins.append(first - second)
        if len(chosen) == SAMPLES:
            break
    if len(chosen) < SAMPLES:
        raise Lfm2kitError(f"{len(chosen)} of {tried} paragraphs qualify, {SAMPLES} are needed")
    samples.write_inputs(folder / "inputs.bin", np.array(chosen))
    samples.write_outputs(folder / "answers.bin", np.array(answers, dtype=np.float32))
    card.add(
        folder,
        inputs={
            "count": SAMPLES,
            "length": LENGTH,
            "candidates": tried,
            "gap_rule": LEAST_GAP,
            "least_gap": float(f"{min(gaps):.3g}"),
            "least_margin": float(f"{min(margins):.3g}"),
            "transformers": version("transformers"),
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Make inputs and answers of a trained model.")
    parser.add_argument("--model", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--data", type=Path, required=True, help="folder of training.prepare")
    options = parser.parse_args()
    make_answers(options.model, read_data(options.data))


if __name__ == "__main__":
    with ended():
        main()
