"""Trains the model on prepared data, and writes it as a checkpoint with a model card.

    python -m training.train --data training/.data --out training/.model --device cuda \\
        --tokens 82e6 --sequences 32 --length 512 --dropout 0.15 --weight-decay 0.1

Needs torch and tokenizers, but no network. It computes in float32; a GPU makes products in TF32.
Seeds are fixed: on one kind of device the same command gives the same model, as far as torch's
kernels are deterministic there.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from lfm2kit.checkpoint.config import parse_config
from lfm2kit.errors import Lfm2kitError
from lfm2kit.formats import BF16
from training import card
from training.commands import ended, whole
from training.data import HELD_OUT, LEARNT, Part, Windows, read_data
from training.recipe import CONFIG, Recipe

with ended():
    import torch
    from tokenizers import Tokenizer
    from torch.nn import functional

    from training.checkpoints import check_target, read_network, write_network
    from training.evaluate import bits_per_byte, expert_loads, forget_loads
    from training.network import Network
    from training.optimisers import balance, optimisers, set_rates

BOS = CONFIG["bos_token_id"]
MEASUREMENTS = 12  # points of the curve of held-out text
PROMPTS = ("It is a truth", "Fellow-Citizens of the Senate", "The captain")


def train(recipe: Recipe, parts: Mapping[str, Part], device: str) -> tuple[Network, list[Any]]:
    """Return the trained network, and the curve: [tokens, training loss, bits per byte] each."""
    torch.manual_seed(recipe.seed)
    network = Network(parse_config(CONFIG), recipe.dropout).to(device)
    steppers = optimisers(network, recipe)
    windows = Windows(parts, recipe.length, BOS, recipe.seed)
    every = -(-recipe.steps // MEASUREMENTS)  # rounded up
    curve, total, begun = [], torch.zeros((), device=device), time.perf_counter()
    for step in range(recipe.steps):
        set_rates(steppers, recipe.rate_at(step))
        loss = _loss(network, torch.from_numpy(windows.draw(recipe.sequences)).to(device))
        loss.backward()
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad()
        balance(network.routers().values(), recipe.bias_rate_at(step))
        total += loss.detach()
        if (step + 1) % every == 0 or step + 1 == recipe.steps:
            since = step % every + 1
            curve.append(_measured(network, parts, recipe, step + 1, total.item() / since))
            total.zero_()
            print(_line(curve[-1], time.perf_counter() - begun), flush=True)
    return network, curve


def _loss(network: Network, windows: torch.Tensor) -> torch.Tensor:
    logits = network(windows[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def _measured(
    network: Network, parts: Mapping[str, Part], recipe: Recipe, steps: int, loss: float
) -> list[float]:
    bits = bits_per_byte(network, parts, recipe.length, BOS, every=16)["all"]
    forget_loads(network)  # held-out tokens balance nothing
    return [steps * recipe.sequences * recipe.length, round(loss, 4), round(bits, 4)]


def _line(point: list[float], seconds: float) -> str:
    tokens, loss, bits = point
    return (
        f"{tokens / 1e6:7.2f} M tokens  loss {loss:.3f}  held out {bits:.3f} bits per byte"
        f"  {tokens / seconds:,.0f} tokens/s"
    )


@torch.no_grad()
def sampled(network: Network, tokenizer: Tokenizer, prompt: str, count: int, seed: int) -> str:
    """Return a prompt and `count` more tokens, drawn at a temperature of 0.6."""
    device = network.embed_tokens.weight.device
    generator = torch.Generator().manual_seed(seed)
    ids = tokenizer.encode(prompt).ids
    for _ in range(count):
        logits = network(torch.tensor([ids], device=device))[0, -1].cpu()
        probabilities = torch.softmax(logits / 0.6, -1)
        ids.append(int(torch.multinomial(probabilities, 1, generator=generator)))
    return str(tokenizer.decode(ids))


def record_of(
    recipe: Recipe, parts: Mapping[str, Part], network: Network, data: Path
) -> dict[str, Any]:
    """Return what the model card says about the trained network, but for the training itself."""
    forget_loads(network)
    bits = bits_per_byte(network, parts, recipe.length, BOS)
    loads = expert_loads(network)
    tokenizer = Tokenizer.from_file(str(data / "tokenizer.json"))
    network.eval()
    return {
        "data": {name: [parts[name].nbytes, len(parts[name].ids)] for name in (*LEARNT, *HELD_OUT)},
        "parameters": sum(values.numel() for values in network.state_dict().values()),
        "bits_per_byte": {name: round(value, 4) for name, value in bits.items()},
        "experts": loads,
        "samples": [sampled(network, tokenizer, p, 80, i) for i, p in enumerate(PROMPTS)],
    }


def command_of(recipe: Recipe, device: str) -> str:
    """Return the command that trains so, with the folders of README.md."""
    folders = "--data training/.data --out training/.model"
    given = [
        f" --{field.name.replace('_', '-')} {getattr(recipe, field.name)}"
        for field in fields(Recipe)
        if getattr(recipe, field.name) != field.default
    ]
    return f"python -m training.train {folders} --device {device}{''.join(given)}"


def hardware(device: str) -> str:
    """Return the name of the device that trains, with torch's version."""
    if device == "cpu":
        name = f"{platform.machine()} CPU, threads: {torch.get_num_threads()}"
    else:
        name = torch.cuda.get_device_name(device)
    return f"{name}, torch {torch.__version__}"


def main() -> None:
    options = parsed()
    recipe = Recipe(**{field.name: getattr(options, field.name) for field in fields(Recipe)})
    parts = read_data(options.data)
    check_target(options.out, options.data)
    if options.device == "cuda":
        if not torch.cuda.is_available():
            raise Lfm2kitError("--device cuda: torch finds no GPU; give --device cpu")
        torch.set_float32_matmul_precision("high")  # TF32
    begun = time.perf_counter()
    network, curve = train(recipe, parts, options.device)
    seconds = time.perf_counter() - begun
    torch.set_float32_matmul_precision("highest")  # what is measured is FP32
    write_network(network, CONFIG, options.out, options.data, BF16)
    stored = read_network(options.out).to(options.device)  # as rounded
    record = record_of(recipe, parts, stored, options.data) | {
        "command": command_of(recipe, options.device),
        "seed": recipe.seed,
        "hardware": hardware(options.device),
        "seconds": round(seconds),
        "tokens": recipe.steps * recipe.sequences * recipe.length,
        "curve": curve,
    }
    card.write(options.out, record)
    print(json.dumps(record["bits_per_byte"]))


def parsed() -> argparse.Namespace:
    """Return the command line's options: the folders, the device, and the recipe's fields."""
    parser = argparse.ArgumentParser(description="Train the model on prepared data.")
    parser.add_argument("--data", type=Path, required=True, help="folder of training.prepare")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    for field in fields(Recipe):
        kind = whole if isinstance(field.default, int) else float
        name = field.name.replace("_", "-")
        parser.add_argument(f"--{name}", type=kind, default=field.default)
    return parser.parse_args()


if __name__ == "__main__":
    with ended():
        main()
