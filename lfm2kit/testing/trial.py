"""What a check is given: the backend on trial, the reference, and a generator of its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from lfm2kit.backend import Backend
from lfm2kit.precisions import FP32, FP32_GRADE, Precision
from lfm2kit.promises import Promise
from lfm2kit.specs import Spec
from lfm2kit.testing.call_log import CallLog
from lfm2kit.testing.cases import CASES, WIDTHS, widened
from lfm2kit.testing.compare import Result
from lfm2kit.testing.guarding import Guarding
from lfm2kit.testing.host_block import HostBlock, host_block, why_not_built
from lfm2kit.testing.kept_weights import as_kept
from lfm2kit.testing.near_ties import NEAR_TIE
from lfm2kit.testing.random_weights import random_weights, with_values_of
from lfm2kit.testing.scope import DEFAULT_SCOPE, OUT_OF_SCOPE, Scope
from lfm2kit.testing.verdicts import Skipped
from lfm2kit.weights import Weights

S = TypeVar("S", bound=Spec)


@dataclass(frozen=True, slots=True)
class Trial:
    """A backend before one check; the reference works in the host's memory."""

    backend: Backend
    reference: Backend
    rng: np.random.Generator
    precision: Precision = FP32
    scope: Scope = DEFAULT_SCOPE
    log: CallLog = field(default_factory=CallLog)  # of the calls of the backend's blocks
    guarding: Guarding = field(default_factory=Guarding)  # of the check's promise

    @property
    def tolerance(self) -> float:
        """Return the largest error of a block, relative to its result's largest value."""
        return self.precision.grade.block_error

    @property
    def is_exact(self) -> bool:
        """Return whether blocks compute as exactly as in float32, however weights are rounded."""
        return self.tolerance <= FP32_GRADE.block_error

    @property
    def near_tie(self) -> float:
        """Return the gap between two scores of a router below which either choice is right."""
        return NEAR_TIE if self.is_exact else self.tolerance

    def assert_same(
        self, got: Result, want: Result, what: str, growth: float = 1, **judged: Any
    ) -> None:
        """Compare two results of the backend by the promise that the check guards.

        If the backend takes it back, they may be `growth` times as far from each other as two
        results of a block that are right; `judged` are other arguments of `assert_close`.
        """
        self.guarding.assert_same(got, want, what, 2 * growth * self.tolerance, **judged)

    @property
    def is_strict(self) -> bool:
        """Return whether the promise that the check guards, if it does, is made."""
        return self.guarding.reason is None

    def promises(self, promise: Promise) -> bool:
        """Return whether the backend makes a promise."""
        return promise.why_not(self.guarding.not_promised) is None

    def supported(self, candidates: Iterable[S]) -> list[S]:
        """Return those that the backend builds; raise `Skipped` with its reason if there are none.

        Of a kind of which it builds none, they come widened: a backend may have kernels for the
        release's widths alone, and is then judged by those.
        """
        by_kind: dict[str, list[S]] = {}
        for spec in self.scope.candidates(candidates):
            by_kind.setdefault(spec.kind, []).append(spec)
        if not by_kind:
            raise Skipped(OUT_OF_SCOPE)
        self.log.has_looked = True
        found = [s for one in by_kind.values() for s in self._built(one) or self._widened(one)]
        if not found:
            first = next(iter(by_kind.values()))[0]
            raise Skipped(f"no {first.kind} block: {self._why_not(first)}")
        return found

    def fitted(self, spec: S) -> S | None:
        """Return the spec, or it widened, if the backend builds that; else None."""
        some = self.scope.candidates([spec])
        return next(iter(self._built(some) or self._widened(some)), None)

    def is_joined(self, spec: Spec) -> bool:
        """Return whether the core joins a spec of parts, each of which has its turn in a check."""
        return self.backend.why_unsupported(spec) is not None

    def takes_any(self, candidates: Sequence[Spec]) -> bool:
        """Return whether the backend builds a candidate, as it is or widened."""
        some = self.scope.candidates(candidates)
        return bool(self._built(some) or self._widened(some))

    def _widened(self, candidates: Sequence[S]) -> list[S]:
        """Return the candidates of the first of WIDTHS at which the backend builds any.

        A scope that has widths of its own has no others.
        """
        if self.scope.widths is not None:
            return []
        wider = ([widened(spec, width) for spec in candidates] for width in WIDTHS)
        return next((list(dict.fromkeys(found)) for w in wider if (found := self._built(w))), [])

    def built(self, candidates: Iterable[S]) -> list[S]:
        """Return those that the backend builds, whole or all their parts; perhaps none."""
        return self._built(self.scope.candidates(candidates))

    def _built(self, candidates: Iterable[S]) -> list[S]:
        return [spec for spec in candidates if self._why_not(spec) is None]

    def _why_not(self, spec: Spec) -> str | None:
        """Return why a block is not judged.

        In a model's widths, blocks that the core would join are judged by their parts alone.
        """
        if self.scope.widths is not None:
            return self.backend.why_unsupported(spec)
        return why_not_built(self.backend, spec)

    def first_of_kinds(self, kinds: Iterable[str] = CASES) -> list[Spec]:
        """Return one spec of each of these kinds that the backend builds."""
        candidates = [spec for kind in kinds for spec in CASES[kind]]
        first = {spec.kind: spec for spec in reversed(self.supported(candidates))}
        return [first[kind] for kind in kinds if kind in first]

    def build(self, spec: Spec, weights: Weights) -> HostBlock:
        return host_block(self.backend, spec, weights, log=self.log)

    def build_reference(
        self, spec: Spec, weights: Weights, reference: Backend | None = None
    ) -> HostBlock:
        """Return the reference's block of the weights with the values that the backend keeps."""
        kept = as_kept(self.backend, spec, weights)
        return host_block(reference or self.reference, spec, kept, is_guarded=False)

    def random_weights(self, spec: Spec) -> Weights:
        """Return random weights that the precision takes."""
        return self.as_taken(random_weights(spec, self.rng))

    def as_taken(self, weights: Weights) -> Weights:
        """Return `weights`, rounded to values that the precision takes if it does not take all.

        They are still stored as float32; the router's, which stays float32, is not rounded.
        """
        format = self.precision.weights
        return weights if format is None else with_values_of(weights, format)

    def pair(self, spec: Spec, weights: Weights | None = None) -> tuple[HostBlock, HostBlock]:
        """Return the backend's block and the reference's, of the same weights (random ones)."""
        weights = self.random_weights(spec) if weights is None else weights
        return self.build(spec, weights), self.build_reference(spec, weights)
