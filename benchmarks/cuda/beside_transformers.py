"""The full-size model beside transformers on one GPU: forwards, decoding, prompts, in one run.

    python benchmarks/cuda/beside_transformers.py --precision fp32,bf16 -r 5

Both get the same random weights and token ids, and each call ends with logits on the host.  The
contenders take turns, and the table shows medians.  transformers runs uncaptured, as
`generate` does by default, with each of its implementations of experts; the faster one counts.
Needs torch, transformers and 70 GB of GPU memory.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import cupy
import numpy as np
import numpy.typing as npt
import torch
from full_size import RandomTensors, build
from transformers_model import transformers_model

from lfm2kit.backend import BF16, Room
from lfm2kit.batch import Batch
from lfm2kit.building.plan import Plan
from lfm2kit.checkpoint.config import LFM2_8B_A1B as C
from lfm2kit.checkpoint.config import model_spec
from lfm2kit.model import LFM2

EXPERTS = ("grouped_mm", "eager")
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PROMPT, STEPS = 16, 16

Ids = npt.NDArray[np.int32]
Timed = Callable[[], float]  # one round of a task: the seconds that count


class Task(NamedTuple):
    name: str
    unit: str
    sequences: int
    tokens: int  # of each sequence's prompt
    steps: int  # of one token, after the prompt; 0: the prompt itself is timed

    @property
    def units(self) -> int:
        """Return how many units a round makes."""
        if self.unit == "samples/s":
            return self.sequences
        return self.sequences * (self.steps or self.tokens)


TASKS = [
    *(Task(f"forward of {n}", "samples/s", n, PROMPT, 0) for n in (1, 16, 64, 128)),
    *(Task(f"decoding {n}", "tokens/s", n, PROMPT, STEPS) for n in (1, 16, 64)),
    Task("prompt of 4096", "tokens/s", 1, 4096, 0),
]


def ours(model: LFM2, task: Task, ids: Ids) -> Timed:
    room = Room.of_sequences(task.sequences, task.tokens + task.steps)
    pages = np.arange(room.pages, dtype=np.int32).reshape(task.sequences, -1)
    state = model.new_state(room)

    def forward(first: int, last: int) -> None:
        chunks, starts = list(ids[:, first:last]), [first] * task.sequences
        model.logits(Batch.of_sequences(chunks, starts=starts, pages=pages), state)

    return timed(task, forward)


def theirs(model: Any, experts: str, task: Task, ids: Ids) -> Timed:
    seen: list[Any] = [None]
    on_device = torch.from_numpy(ids.astype(np.int64)).cuda()

    def forward(first: int, last: int) -> None:
        if first == 0:
            model.set_experts_implementation(experts)
            seen[0] = None
        with torch.inference_mode():
            answer = model(
                input_ids=on_device[:, first:last],
                past_key_values=seen[0],
                use_cache=True,
                logits_to_keep=1,
            )
        seen[0] = answer.past_key_values
        answer.logits[:, 0].float().cpu()

    return timed(task, forward)


def timed(task: Task, forward: Callable[[int, int], None]) -> Timed:
    """Return a function that runs the task once, and returns the seconds of what is timed."""

    def once() -> float:
        start = time.perf_counter()
        forward(0, task.tokens)
        if task.steps:
            start = time.perf_counter()
        for position in range(task.tokens, task.tokens + task.steps):
            forward(position, position + 1)
        return time.perf_counter() - start

    return once


def medians(contenders: Mapping[str, Timed], repetitions: int) -> dict[str, float]:
    """Return the median seconds of each, after a round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round in range(1 + repetitions):
        for name, once in contenders.items():
            seconds = once()
            if round:
                times[name].append(seconds)
    return {name: statistics.median(some) for name, some in times.items()}


def compare(precision: str, repetitions: int) -> None:
    mine = build(Plan.parse("cuda"), precision, BF16)
    tensors = RandomTensors(model_spec(C, tied=True).parameters(), BF16)
    peer = transformers_model(tensors).to(TYPES[precision])
    for task in TASKS:
        size = task.sequences, task.tokens + task.steps
        ids = np.random.default_rng(0).integers(C.vocab_size, size=size, dtype=np.int32)
        contenders = {"ours": ours(mine, task, ids)}
        contenders |= {name: theirs(peer, name, task, ids) for name in EXPERTS}
        speeds = {k: task.units / s for k, s in medians(contenders, repetitions).items()}
        ratio = speeds["ours"] / max(speeds[name] for name in EXPERTS)
        cells = (f"{speeds[name]:.0f}" for name in ("ours", *EXPERTS))
        print(f"| {precision} | {task.name} | {task.unit} |", " | ".join(cells), f"| {ratio:.2f} |")
        cupy.get_default_memory_pool().free_all_blocks()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--precision", default="fp32,bf16")
    parser.add_argument("-r", "--repetitions", type=int, default=5)
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    print("| precision | task | | lfm2kit | transformers grouped_mm | eager | ratio |")
    print("|---" * 7 + "|")
    for precision in options.precision.split(","):
        compare(precision, options.repetitions)
        torch.cuda.empty_cache()
        cupy.get_default_memory_pool().free_all_blocks()


if __name__ == "__main__":
    main()
