"""Jinja's sandbox with a bound on the steps of a template, which may loop for ever.

A step is a pass of a loop, a test of a loop's item, or a call.  Steps are counted, so the bound is
the same on every machine (decision 0042).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.sandbox import ImmutableSandboxedEnvironment

MOST_STEPS = 1_000_000  # of a rendering, which take a few seconds

_LEFT: ContextVar[Iterator[int]] = ContextVar("steps that a rendering has left")


class TooManyStepsError(Exception):
    """The end of a rendering that may never end by itself."""


@contextmanager
def bounded() -> Iterator[None]:
    """Bound the steps of what is rendered inside; raise `TooManyStepsError` beyond them."""
    before = _LEFT.set(iter(range(MOST_STEPS)))
    try:
        yield
    finally:
        _LEFT.reset(before)


class _Counting(CodeGenerator):
    """A compiler of templates whose loops call `step` for each item."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:  # noqa: N802 - Jinja calls it so
        step = nodes.Call(nodes.EnvironmentAttribute("step"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(step))
        if node.test is not None:
            node.test = nodes.And(step, node.test)
        node.set_lineno(node.lineno)
        super().visit_For(node, frame)


class Sandbox(ImmutableSandboxedEnvironment):
    """An environment whose templates count their steps."""

    code_generator_class = _Counting

    def step(self) -> bool:
        """Return True, for tests of items; its call is what counts."""
        return True

    def call(self, context: Any, called: Any, /, *arguments: Any, **named: Any) -> Any:
        if next(_LEFT.get(), None) is None:
            said = f"more than {MOST_STEPS} passes of loops and calls; it may never end"
            raise TooManyStepsError(said)
        return super().call(context, called, *arguments, **named)
