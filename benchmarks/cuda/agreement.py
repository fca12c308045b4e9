"""Logits of the full-size model beside those of transformers in FP32, on one GPU.

    python benchmarks/cuda/agreement.py -n 16 --precision fp32,bf16

All get the same random weights, numbers that BF16 holds.  A sample may differ by more where a
router of either is within rounding of another choice: how many do is printed beside the largest
difference.  Needs torch, transformers and 70 GB of GPU memory, 20 GB more for each precision of 16
bits.
"""

from __future__ import annotations

import argparse

import numpy as np
import numpy.typing as npt
import torch
from full_size import RandomTensors, build
from transformers_model import transformers_model

from lfm2kit.backend import BF16
from lfm2kit.building.plan import Plan
from lfm2kit.checkpoint.config import LFM2_8B_A1B as C
from lfm2kit.checkpoint.config import model_spec
from lfm2kit.measuring.bench import random_batch

TOLERANCE = 1e-3
Float32 = npt.NDArray[np.float32]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=16)
    parser.add_argument("--precision", default="fp32", help="one or more, with commas between")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    batch = random_batch(options.n, 16, C.vocab_size, seed=0)
    ours = {
        precision: build(Plan.parse("cuda"), precision, BF16).logits(batch).copy()
        for precision in options.precision.split(",")
    }
    theirs = transformers_model(RandomTensors(model_spec(C, tied=True).parameters(), BF16))
    ids = torch.tensor(batch.token_ids.reshape(options.n, -1), device="cuda", dtype=torch.long)
    with torch.inference_mode():
        answer = theirs(input_ids=ids, use_cache=False, logits_to_keep=1).logits
    expected = answer[:, -1].float().cpu().numpy()
    print(f"logits of std {expected.std():.3f}")
    for precision, logits in ours.items():
        print(f"{precision}: {compared(logits, expected)}")


def compared(ours: Float32, expected: Float32) -> str:
    difference = np.abs(ours - expected)
    worst = difference.max(axis=1)
    second, first = np.sort(expected, axis=1)[:, -2:].T
    is_equal = ours.argmax(axis=1) == expected.argmax(axis=1)
    sure = first - second > 2 * difference.mean(axis=1)
    return (
        f"largest difference {worst.max():.2e}, median over samples {np.median(worst):.2e}; "
        f"{np.sum(worst > TOLERANCE)} of {len(ours)} samples beyond {TOLERANCE:g}; top-1 equal for "
        f"{is_equal.mean():.0%}, for {is_equal[sure].sum()} of the {sure.sum()} whose margin is "
        "more than twice the mean difference"
    )


if __name__ == "__main__":
    main()
