"""The wrappers that plugins put around a model's blocks, and what they mean for its capture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from reprlib import repr as brief  # of what a plugin returned, however long it is

from lfm2kit.backend import Block
from lfm2kit.building.placement import Placed
from lfm2kit.building.plugins import Plugins
from lfm2kit.errors import Lfm2kitError
from lfm2kit.hookspecs import Wrapper
from lfm2kit.plugin_faults import blaming
from lfm2kit.specs import Spec

Around = Sequence[tuple[str, Wrapper]]  # each with its plugin's name, the innermost first


@dataclass(frozen=True, slots=True)
class Wrappers:
    """The wrappers around each block of a model, by the block's name."""

    around: Mapping[str, Around]

    @classmethod
    def of(cls, placed: Placed, plugins: Plugins) -> Wrappers:
        """Ask every plugin about every block."""
        blocks = {p.name: plugins.wrappers(p.name, p.spec, p.memory) for p in placed.tree()}
        return cls({name: around for name, around in blocks.items() if around})

    def wrap(self, name: str, spec: Spec, block: Block) -> Block:
        """Return the block called `name` inside its wrappers, usually none."""
        for plugin, wrapper in self.around.get(name, ()):
            who = f"plugin '{plugin}', wrapping {name or 'the model'},"
            with blaming(who):
                block = wrapper.wrap(block)
            if not callable(block):
                raise Lfm2kitError(f"{who} returned {brief(block)}, not a block")
        return block

    @property
    def survive_capture(self) -> bool:
        return not self._in_calls_alone()

    def why_not_captured(self) -> Iterator[str]:
        """Yield a sentence for each plugin whose wrappers prevent a capture."""
        for plugin, (first, *others) in self._in_calls_alone().items():
            more = f" and {len(others)} more" if others else ""
            yield f"not captured: plugin '{plugin}' wraps {first or 'the model'}{more}"

    def _in_calls_alone(self) -> dict[str, list[str]]:
        """Return the blocks, by plugin, that have a wrapper which does not survive capture."""
        blocks: dict[str, list[str]] = {}
        for name, around in self.around.items():
            for plugin, wrapper in around:
                if not wrapper.survives_capture:
                    blocks.setdefault(plugin, []).append(name)
        return blocks
