"""docs/records.md says what the schemas say."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_the_script_writes() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "make_record_reference.py"))
    page = (ROOT / "docs" / "records.md").read_text(encoding="utf-8")
    assert page == script["page"](), "stale: run python scripts/make_record_reference.py"
