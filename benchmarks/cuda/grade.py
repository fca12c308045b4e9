"""The assignment's whole scheme with LFM2-8B-A1B at full size, on one GPU.

    python benchmarks/cuda/grade.py --html grade.html --markdown grade.md

The weights are random, as those of `full_size.py`, and the answers those of transformers in FP32,
whose model is on the GPU before ours is.  Needs torch, transformers and 70 GB of GPU memory.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from pathlib import Path

import numpy as np
import torch
from full_size import RandomTensors
from transformers_model import transformers_model

from lfm2kit.backend import BF16, Weights
from lfm2kit.building.options import Options
from lfm2kit.checkpoint import Checkpoint
from lfm2kit.checkpoint.config import LFM2_8B_A1B, model_spec
from lfm2kit.cli.grading import deliver, measured
from lfm2kit.cli.report import Report
from lfm2kit.grading.models import COUNTS, SEQ_LEN
from lfm2kit.measuring import samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("-r", "--repetitions", type=int, default=10)
    parser.add_argument("--html", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    html, markdown = (one and one.absolute() for one in (options.html, options.markdown))
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        checkpoint = full_size()
        write_answers(checkpoint)
        asked = Options(backend=options.backend)
        setup, graded = measured(checkpoint, asked, options.repetitions, None, "")
    deliver(Report(None, "lfm2kit grade"), setup, graded, markdown, html)


def full_size() -> Checkpoint:
    spec = model_spec(LFM2_8B_A1B, tied=True)
    weights = Weights(RandomTensors(spec.parameters(), BF16))
    return Checkpoint(Path("LFM2-8B-A1B at random"), spec, weights, LFM2_8B_A1B)


def write_answers(checkpoint: Checkpoint) -> None:
    """Write samples beside the model, and the logits of transformers for them."""
    torch.backends.cuda.matmul.allow_tf32 = False
    size = (max(COUNTS), SEQ_LEN)
    ids = np.random.default_rng(0).integers(0, LFM2_8B_A1B.vocab_size, size, dtype=np.int32)
    tensors = RandomTensors(checkpoint.spec.parameters(), BF16)
    with torch.inference_mode():
        model = transformers_model(tensors)
        answers = model(torch.tensor(ids, device="cuda"), use_cache=False, logits_to_keep=1).logits
    samples.write_inputs(checkpoint.beside("inputs.bin"), ids)
    samples.write_outputs(checkpoint.beside("answers.bin"), answers[:, -1].float().cpu().numpy())
    del model, answers
    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
