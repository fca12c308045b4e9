"""Measures ranks with a GPU each: all experts on each, or shared out, by several exchanges.

    python benchmarks/ranks/gpus.py
    python benchmarks/ranks/gpus.py --ranks 2 -n 8,16,64,128 --precisions fp32,bf16 -r 20

It starts a job of its own, in which every model is LFM2-8B-A1B at full size with random weights.
Prints Markdown: the samples/s of n samples of 16 tokens, of all ranks together, as medians of
forwards from barrier to barrier, until each rank has its logits and until rank 0 has all of them,
and whether the logits have the bits of one GPU alone.  Then the dispatch and combine of one layer
alone, of 22 in a graph, in us.

| kind | |
|---|---|
| alone | one GPU, all samples |
| dp | all experts on each rank |
| ep | experts shared out, tokens travel between GPUs |
| pairs | experts shared out in groups of two ranks |
| host | experts shared out, tokens travel through the host |
| hybrid | the same, and the CPU chooses the experts |
| nccl | experts shared out, tokens travel over NCCL, if plugins/lfm2kit-nccl is installed |

The last table says which of them `--parallel auto` takes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from lfm2kit_mpi.launcher import MpiLauncher, on_ranks

from lfm2kit.batch import Batch
from lfm2kit.building.loading import find_model, set_up
from lfm2kit.building.options import Options
from lfm2kit.checkpoint import Checkpoint, open_checkpoint
from lfm2kit.checkpoint.config import LFM2_8B_A1B, model_spec
from lfm2kit.host_exchange import offered
from lfm2kit.measuring.gathering import Gather, gather_over
from lfm2kit.memory import HOST, Memory
from lfm2kit.model import LFM2
from lfm2kit.ranks.joining import settled_alike
from lfm2kit.transport import Traffic, Transport, evenly, held_once, share
from lfm2kit.weights import Weights

sys.path.append(str(Path(__file__).resolve().parents[1] / "cuda"))
from full_size import STORED_AS, RandomTensors

LENGTH, LAYERS = 16, 22
HIDDEN_SIZE, K, EXPERTS = 2048, 4, 32
OPTIONS: dict[str, dict[str, Any]] = {
    "dp": {"parallel": "dp"},
    "ep": {"parallel": "ep", "exchange": "device"},
    "pairs": {"parallel": "ep", "exchange": "device", "ep_size": 2},
    "host": {"parallel": "ep", "exchange": "host"},
    "hybrid": {"parallel": "ep", "exchange": "host", "backend": "hybrid"},
    "nccl": {"parallel": "ep", "exchange": "device"},
}


class Ranks:
    """This rank of the job, and the models that it measures."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.transport: Transport = MpiLauncher().connect()
        self.rank, self.size = self.transport.world.rank, self.transport.world.size
        self.arguments = arguments
        self.checkpoint = checkpoint_of(arguments)
        self.over = dict.fromkeys(OPTIONS, self.transport)
        with suppress(ImportError):
            self.over["nccl"] = import_module("lfm2kit_nccl").NcclTransport(self.transport)

    def say(self, line: str) -> None:
        if self.rank == 0:
            print(line, flush=True)

    def built(self, kind: str, precision: str) -> LFM2 | None:
        """Return this rank's model; None on a rank that stands by."""
        common: dict[str, Any] = {"backend": self.arguments.backend, "precision": precision}
        if self.arguments.trim:
            common["rewrites"] = ["trim"]
        if kind == "alone":
            alone = set_up(self.checkpoint, Options(**common))
            return alone.build() if self.rank == 0 else None
        options, transport = Options(**(common | OPTIONS[kind])), self.over[kind]
        setup = set_up(self.checkpoint, options, transport=transport)
        return settled_alike(transport, setup).build()

    def seconds(self, call: Callable[[], object]) -> float:
        """Return the median time from when all ranks begin to when all have ended."""
        times = []
        for _ in range(3 + self.arguments.repetitions):
            self.transport.barrier()
            start = time.perf_counter()
            call()
            self.transport.barrier()
            times.append(time.perf_counter() - start)
        return median(times[3:])


def checkpoint_of(arguments: argparse.Namespace) -> Checkpoint:
    if arguments.model is not None:
        return open_checkpoint(find_model(arguments.model))
    spec = model_spec(LFM2_8B_A1B, tied=True)
    tensors = RandomTensors(spec.parameters(), STORED_AS["BF16"], arguments.bias_std)
    return Checkpoint(Path("random"), spec, Weights(tensors), None)


def vocab_size_of(ranks: Ranks) -> int:
    return ranks.checkpoint.spec.embed_tokens.vocab_size


def batches(ranks: Ranks, n: int) -> tuple[Batch, Batch]:
    """Return all samples, and this rank's."""
    ids = np.random.default_rng(n).integers(0, vocab_size_of(ranks), (n, LENGTH)).tolist()
    mine = share(n, ranks.size, ranks.rank)
    return Batch.of_sequences(ids), Batch.of_sequences(ids[mine.start : mine.stop])


def _logits(model: LFM2 | None, batch: Batch) -> Any:
    return None if model is None else model.logits(batch)


def measured(ranks: Ranks, kind: str, precision: str) -> Iterator[tuple[int, list[float], Any]]:
    """Yield each n with the samples/s without and with the gather, and all logits, on rank 0."""
    model = ranks.built(kind, precision)
    for n in map(int, ranks.arguments.n.split(",")):
        everything, mine = batches(ranks, n)
        ways = [partial(_logits, model, everything if kind == "alone" else mine)]
        if kind != "alone":
            gather = gather_over(ranks.transport, n, vocab_size_of(ranks))
            ways.append(partial(_gathered, gather, model, mine))
        yield n, [n / ranks.seconds(call) for call in ways], ways[-1]()


def _gathered(gather: Gather, model: LFM2 | None, batch: Batch) -> Any:
    assert model is not None, "every rank has one"
    return gather.end(slice(None), model.logits(batch))


def layer_alone(ranks: Ranks, kind: str, memory: Memory, tokens: int) -> float | None:
    """Return the us of a dispatch and a combine in a graph; None if there is no such exchange."""
    from lfm2kit_cuda.capture import recorded

    offer = offered(ranks.over[kind], memory)
    if offer.memory.name == HOST.name or offer.why_not() is not None:
        return None
    owners = held_once(evenly(ranks.size, EXPERTS), ranks.size)
    layers = [offer.create(Traffic(HIDDEN_SIZE, K, owners)) for _ in range(LAYERS)]
    rng = np.random.default_rng(ranks.rank)
    ids = rng.random((tokens, EXPERTS)).argsort(axis=1)[:, :K].astype(np.int32)
    with memory.stream(), offer.around(tokens):  # type: ignore[attr-defined]
        import cupy

        stream, start = cupy.cuda.get_current_stream(), memory.from_host
        x = start(rng.standard_normal((tokens, HIDDEN_SIZE), np.float32))
        there = start(ids), start(np.ones(ids.shape, np.float32))

        def step(batch: Any) -> Any:
            delta = x
            for layer in layers:
                delta = layer.combine(layer.dispatch(delta, *there).x)
            return delta

        step(None)
        stream.synchronize()
        graph, *_kept = recorded(step, None)  # type: ignore[arg-type]

        def replay() -> None:
            graph.launch(stream)
            stream.synchronize()

        return 1e6 * ranks.seconds(replay) / LAYERS


def kinds_of(ranks: Ranks) -> list[str]:
    wanted = ranks.arguments.kinds.split(",")
    left_out = {"nccl"} if ranks.over["nccl"] is ranks.transport else set()
    if ranks.size % 2 or ranks.size == 2:
        left_out.add("pairs")
    return [kind for kind in wanted if kind not in left_out]


def of_models(ranks: Ranks) -> None:
    trimmed = ", trimmed" if ranks.arguments.trim else ""
    ranks.say(
        "| precision | n | kind | samples/s | with the gather | bits |\n|---|---|---|---|---|---|"
    )
    for precision in ranks.arguments.precisions.split(","):
        expected: dict[int, Any] = {}
        for kind in ["alone", *kinds_of(ranks)]:
            for n, rates, logits in measured(ranks, kind, precision):
                if ranks.rank > 0:
                    continue
                expected.setdefault(n, logits)
                bits = "same" if np.array_equal(expected[n], logits) else "**other**"
                without, gathered = rates[0], rates[-1]
                cells = f"{precision}{trimmed}", n, kind, f"{without:.0f}", f"{gathered:.0f}", bits
                ranks.say(f"| {' | '.join(map(str, cells))} |")


def of_a_layer(ranks: Ranks) -> None:
    options = Options(backend=ranks.arguments.backend)
    memory = set_up(ranks.checkpoint, options, world=ranks.transport.world).placed.memory
    if memory.name == HOST.name:
        return
    ranks.say("\n| n | kind | dispatch and combine of a layer, us |\n|---|---|---|")
    for n in map(int, ranks.arguments.n.split(",")):
        for kind in [kind for kind in kinds_of(ranks) if kind in ("ep", "nccl")]:
            us = layer_alone(ranks, kind, memory, -(-n // ranks.size) * LENGTH)
            ranks.say(f"| {n} | {kind} | {'not possible' if us is None else f'{us:.1f}'} |")


def of_auto(ranks: Ranks) -> None:
    """Say what ranks do that `lfm2kit run -n N` starts."""
    ranks.say("\n| precision | n | `--parallel auto` |\n|---|---|---|")
    for precision in ranks.arguments.precisions.split(","):
        options = Options(backend=ranks.arguments.backend, precision=precision)
        for n in map(int, ranks.arguments.n.split(",")):
            tokens = -(-n // ranks.size) * LENGTH
            chosen = set_up(ranks.checkpoint, options, transport=ranks.transport, tokens=tokens)
            ranks.say(f"| {precision} | {n} | {chosen.grouping} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("-n", default="8,16,64,128", help="samples of all ranks together")
    parser.add_argument("--precisions", default="fp32,bf16")
    parser.add_argument("--kinds", default=",".join(OPTIONS), help="beside one GPU alone")
    parser.add_argument("-r", "--repetitions", type=int, default=20)
    parser.add_argument("--bias-std", type=float, default=0.05, help="of the routers")
    parser.add_argument("--trim", action="store_true", help="leave out rows of no logit")
    parser.add_argument("--only-bits", action="store_true", help="time no layer and name no choice")
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--model", help="a checkpoint instead of the full size")
    arguments = parser.parse_args()
    if MpiLauncher().world_size() is None:
        command = on_ranks(arguments.ranks, [sys.executable, *sys.argv])
        sys.exit(subprocess.run(command, check=False).returncode)
    ranks = Ranks(arguments)
    of_models(ranks)
    if not arguments.only_bits:
        of_a_layer(ranks)
        of_auto(ranks)
    ranks.transport.finish(0)


if __name__ == "__main__":
    main()
