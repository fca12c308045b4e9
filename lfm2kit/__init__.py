"""lfm2kit runs the LFM2-MoE family with every block's implementation coming from a plugin.

Start reading at `lfm2kit.specs` (what a block must compute), `lfm2kit.backend` (what a backend
must offer) and `lfm2kit.model` (the forward).
"""

# The names below are imported when they are first used: the console script imports this package
# before it can handle signals, and NumPy alone takes a tenth of a second.
TYPE_CHECKING = False  # type checkers take it for true; `typing`'s own would have to be imported
if TYPE_CHECKING:
    from lfm2kit.backend import API_VERSION, BackendPlugin
    from lfm2kit.batch import Batch
    from lfm2kit.building.loading import load_model
    from lfm2kit.checkpoint.readers import CheckpointReader
    from lfm2kit.errors import Lfm2kitError
    from lfm2kit.hookspecs import Command, Wrapper, hookimpl
    from lfm2kit.precisions import BF16_GRADE, FP16_GRADE, FP32_GRADE, Grade, Precision
    from lfm2kit.ranks.joining import joined_job
    from lfm2kit.rewrites import Rewrite
    from lfm2kit.rewrites.hidden_states import HiddenStates
    from lfm2kit.state import Room
    from lfm2kit.transport import TransportPlugin
else:
    _HOMES = {
        "API_VERSION": "backend",
        "BackendPlugin": "backend",
        "Batch": "batch",
        "CheckpointReader": "checkpoint.readers",
        "Command": "hookspecs",
        "BF16_GRADE": "precisions",
        "FP16_GRADE": "precisions",
        "FP32_GRADE": "precisions",
        "Grade": "precisions",
        "HiddenStates": "rewrites.hidden_states",
        "Lfm2kitError": "errors",
        "Precision": "precisions",
        "Rewrite": "rewrites",
        "Room": "state",
        "TransportPlugin": "transport",
        "Wrapper": "hookspecs",
        "hookimpl": "hookspecs",
        "joined_job": "ranks.joining",
        "load_model": "building.loading",
    }

    def __getattr__(name):
        if name not in _HOMES:
            raise AttributeError(f"module 'lfm2kit' has no attribute {name!r}")
        from importlib import import_module

        value = getattr(import_module(f"lfm2kit.{_HOMES[name]}"), name)
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *_HOMES})


__all__ = [
    "API_VERSION",
    "BF16_GRADE",
    "FP16_GRADE",
    "FP32_GRADE",
    "BackendPlugin",
    "Batch",
    "CheckpointReader",
    "Command",
    "Grade",
    "HiddenStates",
    "Lfm2kitError",
    "Precision",
    "Rewrite",
    "Room",
    "TransportPlugin",
    "Wrapper",
    "hookimpl",
    "joined_job",
    "load_model",
]
__version__ = "0.1.0"
