"""Writes LFM2-8B-A1B at full size with random weights in BF16, 17 GB, to a new folder.

    python benchmarks/cuda/write_full_size.py FOLDER

The weights are those of `full_size.py`, which repeat after 67 million numbers, so that it takes
seconds and not minutes.
"""

from __future__ import annotations

import argparse
from functools import lru_cache
from pathlib import Path

from full_size import RandomTensors

from lfm2kit.backend import BF16, Tensor
from lfm2kit.checkpoint.config import LFM2_8B_A1B, model_spec
from lfm2kit.checkpoint.convert import Source, config_fields, write_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bias-std", type=float, default=0.05, help="of the routers")
    asked = parser.parse_args()
    write_checkpoint(source(asked.bias_std), asked.folder)


def source(bias_std: float) -> Source:
    """Return the tensors to write, each made when its first piece is wanted."""
    shapes = model_spec(LFM2_8B_A1B, tied=True).parameters()
    tensors = RandomTensors(shapes, BF16, bias_std)

    @lru_cache(maxsize=2)
    def tensor(name: str) -> Tensor:
        return tensors[name]

    return Source(
        config=config_fields(LFM2_8B_A1B),
        shapes=shapes,
        formats=dict.fromkeys(shapes, BF16),
        values=lambda name, begin, end: tensor(name).flat(begin, end),
    )


if __name__ == "__main__":
    main()
