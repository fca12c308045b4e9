"""Announces the command `lfm2kit perplexity`.  Importing this costs nothing."""

from __future__ import annotations

from collections.abc import Iterator

import lfm2kit


@lfm2kit.hookimpl
def lfm2kit_commands() -> Iterator[lfm2kit.Command]:
    from lfm2kit_perplexity.options import perplexity  # only a command line needs Typer

    yield lfm2kit.Command("perplexity", perplexity)
