"""Blocks that can be called from any thread."""

from __future__ import annotations

from typing import Any

import cupy

from lfm2kit.backend import Block, Operator, State, TellsParts
from lfm2kit_cuda.device import on_device


class OnDevice:
    """A block whose calls run on the device that it was built for, whatever device is current."""

    def __init__(self, block: Block, device: int) -> None:
        self._block = block
        self._device = device
        if isinstance(block, Operator):
            self._operator = block
            self.new_state = self._new_state
        if isinstance(block, TellsParts):
            self.tell_parts = block.tell_parts

    def __call__(self, *inputs: Any) -> Any:
        with on_device(self._device):
            return self._block(*inputs)

    def _new_state(self, *room: Any) -> State:
        """Return the block's new state, which any stream may use.

        Its memory may have been another array's, which the current stream is still to read.
        """
        with on_device(self._device):
            state = self._operator.new_state(*room)
            cupy.cuda.get_current_stream().synchronize()
            return state
