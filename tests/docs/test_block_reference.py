"""docs/blocks.md says what the source says, and has each spec with its code and a call."""

from __future__ import annotations

import inspect
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from lfm2kit import specs
from lfm2kit.reference.backend import BLOCKS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "blocks.md").read_text(encoding="utf-8")
SPECS = [s for s in vars(specs).values() if inspect.isclass(s) and issubclass(s, specs.Spec)]
SPECS.remove(specs.Spec)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))  # of which one imports another
    return runpy.run_path(str(ROOT / "scripts" / "make_block_reference.py"))


def test_the_page_is_what_the_script_writes(script: dict[str, Any]) -> None:
    assert script["page"]() == PAGE, "stale: run python scripts/make_block_reference.py"


def test_each_spec_has_a_section_with_three_parts() -> None:
    sections = re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:-1]
    assert sorted(text.split()[0] for text in sections) == sorted(s.__name__ for s in SPECS)
    for text in sections:
        assert re.findall(r"^\*\*(\w+)\*\*$", text, re.MULTILINE) == ["Spec", "Call", "Code"]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: str(spec.__name__))
def test_the_contract_and_the_code_of_a_spec_are_on_the_page(spec: type[specs.Spec]) -> None:
    contract = inspect.getdoc(spec)
    assert contract is not None
    assert contract.splitlines()[0] in PAGE
    if spec in BLOCKS:
        assert inspect.getsource(BLOCKS[spec]).rstrip() in PAGE
