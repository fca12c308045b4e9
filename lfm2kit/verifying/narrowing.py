"""Looks into a block that differs: which of its parts, built alone by its backend, differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lfm2kit.backend import Backend, Block
from lfm2kit.building.placement import Placed
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.specs import Spec
from lfm2kit.testing.compare import each
from lfm2kit.testing.host_block import HostBlock
from lfm2kit.testing.near_ties import GapWatch
from lfm2kit.verifying.differences import Difference, farthest
from lfm2kit.verifying.forced import FORWARD, First
from lfm2kit.verifying.near_ties import allowed_error, is_clear
from lfm2kit.verifying.twins import copied, twin, whole
from lfm2kit.weights import Weights


def parts_that_differ(
    backend: Backend, first: First, weights: Weights, error: float
) -> Iterator[Difference]:
    """Yield how far each part of a block is from the reference's, the smallest parts last.

    Each part that `backend` builds alone gets the arguments that it has in the reference's forward
    through the block.  `error` is what the backend's grade allows.  Nothing is yielded for a block
    without parts, or one that differs only after a state: a part's state would be empty.
    """
    placed = first.checked.placed
    if first.call.state is not None or not whole(placed.spec).parts():
        return
    watch = GapWatch(ReferenceBackend())
    recorder = _Recorder()
    block = twin(watch, placed.name, placed.spec, weights, recorder.around)
    block(*first.inputs)
    for name, spec, inputs, want in recorder.calls[:-1]:  # the last one is the block itself
        if backend.why_unsupported(spec) is not None:
            continue
        scoped = weights.scope(_scope_of(whole(placed.spec), name.removeprefix(placed.name)[1:]))
        yield _difference(backend, placed, name, spec, scoped, inputs, want, watch, error)


def _difference(
    backend: Backend,
    placed: Placed,
    name: str,
    spec: Spec,
    weights: Weights,
    inputs: Sequence[Any],
    want: Any,
    watch: GapWatch,
    error: float,
) -> Difference:
    got = HostBlock(spec, backend.build(spec, weights), backend.memory(spec))(*inputs)
    allowed = allowed_error(spec, error)
    clear = is_clear(watch, allowed, len(each(want)[0]))
    fields = farthest(got, want, allowed, clear)
    return Difference(name, spec.kind, placed.backend or "", FORWARD, allowed=allowed, **fields)


class _Recorder:
    """Notes the calls of blocks: their arguments, before they may be written, and results."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Spec, Sequence[Any], Any]] = []

    def around(self, name: str, spec: Spec, block: Block) -> Block:
        return _Recorded(self, name, spec, block)


class _Recorded:
    def __init__(self, recorder: _Recorder, name: str, spec: Spec, block: Block) -> None:
        self._recorder, self._name, self._spec, self._block = recorder, name, spec, block
        self.new_state = getattr(block, "new_state", None)

    def __call__(self, *inputs: Any) -> Any:
        copies = [copied(value) for value in inputs]
        result = self._block(*inputs)
        copy = tuple(map(copied, result)) if isinstance(result, tuple) else copied(result)
        self._recorder.calls.append((self._name, self._spec, copies, copy))
        return result


def _scope_of(spec: Spec, path: str) -> str:
    """Return the scope of the part at a path of roles, relative to its spec's."""
    scopes: list[str] = []
    for role in path.split("."):
        part = next(part for part in spec.parts() if part.role == role)
        scopes += [part.scope] if part.scope else []
        spec = part.spec
    return ".".join(scopes)
