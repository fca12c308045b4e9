"""When this process began to run lfm2kit: the first module that is imported takes the time."""

from __future__ import annotations

from time import perf_counter

STARTED = perf_counter()
