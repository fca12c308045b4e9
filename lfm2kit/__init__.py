"""lfm2kit runs the LFM2-MoE family with every block's implementation coming from a plugin.

Start reading at `lfm2kit.specs` (what a block must compute), `lfm2kit.backend` (what a backend
must offer) and `lfm2kit.model` (the forward).
"""

from lfm2kit.backend import API_VERSION, BackendPlugin
from lfm2kit.errors import Lfm2kitError
from lfm2kit.hookspecs import hookimpl
from lfm2kit.transport import TransportPlugin

__all__ = ["API_VERSION", "BackendPlugin", "Lfm2kitError", "TransportPlugin", "hookimpl"]
__version__ = "0.1.0"
