"""Compares the network with transformers and with lfm2kit, on random weights or a checkpoint.

    python -m training.check                 random weights of the recipe's model, and of others
    python -m training.check FOLDER          an exported checkpoint

Needs torch and transformers. Exits with 1 if logits differ by more than 1e-4.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from lfm2kit import Batch, load_model
from lfm2kit.checkpoint.config import parse_config
from lfm2kit.formats import F32
from training.commands import ended
from training.recipe import CONFIG

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
with ended():
    import torch
    from oracle import Oracle

    from training.checkpoints import read_network, write_network
    from training.network import Network

TOLERANCE = 1e-4
LENGTH = 48
CONFIGS: dict[str, dict[str, Any]] = {
    "the recipe's": {},
    "four taps": {"conv_L_cache": 4},
    "weights not normalised": {"norm_topk_prob": False, "routed_scaling_factor": 1.5},
}


def largest_difference(folder: Path, network: Network) -> tuple[float, float]:
    """Return how far a network's logits are from transformers' and from lfm2kit's reference."""
    ids = np.random.default_rng(0).integers(0, network.config.vocab_size, LENGTH)
    network.eval()
    with torch.no_grad():
        logits = network(torch.tensor(ids)[None])[0].numpy()
    oracle = Oracle(folder).logits(ids.astype(np.int32))
    own = load_model(folder, "reference").logits(Batch.of_sequences([ids.tolist()]))
    return float(np.abs(logits - oracle).max()), float(np.abs(logits[-1] - own[0]).max())


def _random_network(config: dict[str, Any]) -> Network:
    torch.manual_seed(0)
    network = Network(parse_config(config))
    for router in network.routers().values():
        torch.nn.init.normal_(router.expert_bias, std=0.1)
    return network


def _report(name: str, folder: Path, network: Network) -> bool:
    ours = largest_difference(folder, network)
    print(f"{name}: {ours[0]:.2e} from transformers, {ours[1]:.2e} from lfm2kit")
    return max(ours) < TOLERANCE


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the network with other implementations.")
    parser.add_argument("folder", type=Path, nargs="?", help="an exported checkpoint")
    options = parser.parse_args()
    if options.folder is not None:
        sys.exit(not _report(str(options.folder), options.folder, read_network(options.folder)))
    good = []
    for name, changes in CONFIGS.items():
        network = _random_network(CONFIG | changes)
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "model"
            write_network(network, CONFIG | changes, target, None, F32)
            good.append(_report(name, target, network))
    sys.exit(not all(good))


if __name__ == "__main__":
    with ended():
        main()
