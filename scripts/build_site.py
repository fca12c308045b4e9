"""Builds the documentation site from the pages as they are, and fails at a dead link.

python scripts/build_site.py

The site has the layout of the repository, so a relative link works on both.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFIG = "zensical.toml"
PAGES, SITE = Path("build/pages"), Path("build/site")  # as the config has them
DECISIONS = Path("docs/decisions")
PATTERNS = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/**/*",
    "backends/*/README.md",
    "plugins/*/README.md",
    "training/README.md",
    "lfm2kit/models/tiny/README.md",
)


def pages() -> Iterator[Path]:
    """Yield the files of the site, relative to the repository."""
    for pattern in PATTERNS:
        yield from (path.relative_to(ROOT) for path in ROOT.glob(pattern) if path.is_file())


def lay_out(folder: Path) -> None:
    """Link the files of the site into `folder`, each to the place that it has in the repository."""
    shutil.rmtree(folder, ignore_errors=True)
    for page in pages():
        (folder / page).parent.mkdir(parents=True, exist_ok=True)
        (folder / page).symlink_to(ROOT / page)
    list_decisions(folder / DECISIONS)


def list_decisions(folder: Path) -> None:
    """Put a list of the decisions, which GitHub shows by itself, below what introduces them."""
    index = folder / "README.md"
    said = index.read_text(encoding="utf-8")
    titles = {page.name: title(page) for page in sorted(folder.glob("[0-9]*.md"))}
    listed = "\n".join(f"- [{title}]({name})" for name, title in titles.items())
    index.unlink()  # the link, and not what it leads to
    index.write_text(f"{said}\n{listed}\n", encoding="utf-8")


def title(page: Path) -> str:
    """Return the heading of a page."""
    with page.open(encoding="utf-8") as lines:
        return next(lines).removeprefix("# ").strip()


def build(into: Path = ROOT) -> int:
    """Build the site in `into / SITE`, and return the exit code of its builder."""
    lay_out(into / PAGES)
    if into != ROOT:
        shutil.copy(ROOT / CONFIG, into)
    return run(into)


def run(folder: Path) -> int:
    """Build the site that the config in `folder` describes; a warning is an error."""
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    return subprocess.run(command, cwd=folder).returncode


if __name__ == "__main__":
    code = build()
    if code == 0:
        print(f"open {SITE / 'docs' / 'index.html'}")
    sys.exit(code)
