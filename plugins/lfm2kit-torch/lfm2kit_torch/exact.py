"""How blocks compute: in float32, without gradients, and with Python's error for too little memory.

PyTorch can be set to multiply float32 in fewer bits.  Such a setting is the user's, for the process
or a thread: it is neither changed nor ignored.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lfm2kit.errors import Lfm2kitError

LIBRARIES = {"cpu": "mkldnn", "cuda": "cuda"}  # which multiply, by the type of a device
EXACT = ("none", "ieee")  # "none": nobody has set it
OVERRIDE = "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"  # if it is 1, it sets that of "cuda" to TF32
NO_MEMORY = "DefaultCPUAllocator: can't allocate memory"  # a RuntimeError like any other


@contextmanager
def in_float32(device: str) -> Iterator[None]:
    """Compute on this type of device.

    Raise `Lfm2kitError` if products would be less exact than float32, and MemoryError if there is
    too little memory.
    """
    _require_float32(device)
    try:
        with torch.inference_mode():
            yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or NO_MEMORY in str(error):
            raise MemoryError(str(error).partition("\n")[0]) from None
        raise


def _require_float32(device: str) -> None:
    library = LIBRARIES[device]
    set_to = getattr(torch.backends, library).matmul.fp32_precision
    if set_to not in EXACT:
        setting = f"torch.backends.{library}.matmul.fp32_precision"
        is_overridden = device == "cuda" and os.environ.get(OVERRIDE) == "1"
        cure = f"unset {OVERRIDE}" if is_overridden else f"type {setting} = 'ieee'"
        raise Lfm2kitError(f"{setting} is {set_to!r}, but fp32 needs products in float32; {cure}")
    if torch.is_autocast_enabled(device):
        raise Lfm2kitError(
            f"torch.autocast({device!r}) is on, but fp32 needs products in float32; call the model "
            "outside of it"
        )
