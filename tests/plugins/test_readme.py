"""README.md: the code for Python runs as it stands, and so does the backend of 15 minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.specs import MLP
from tests.core.small import random_weights
from tests.plugins.test_docs import fences

PAGE = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
FROM_PYTHON, BACKEND = fences(PAGE, "python")


def test_the_five_lines_for_python_print_what_they_say(capsys: pytest.CaptureFixture[str]) -> None:
    code = [line for line in FROM_PYTHON.splitlines() if line]
    assert len(code) <= 5
    names: dict[str, Any] = {}
    exec(FROM_PYTHON, names)
    assert names["logits"].dtype == np.float32
    shape, next_tokens = capsys.readouterr().out.split(") ")
    assert f"{shape})" in code[-1].partition("#")[2]
    assert len(next_tokens.split()) == 2


def test_the_backend_of_15_minutes_builds_an_mlp() -> None:
    names: dict[str, Any] = {}
    exec(BACKEND, names)
    (plugin,) = names["lfm2kit_backends"]()
    spec = MLP(8, 12)
    weights = random_weights(spec)
    x = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    block = plugin.create(None).build(spec, weights)
    expected = ReferenceBackend().build(spec, weights)(x)
    np.testing.assert_allclose(block(x), expected, rtol=1e-5)
