"""The documentation site: it is built without a warning, and what was built leads nowhere else."""

from __future__ import annotations

import re
import runpy
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

import pytest

pytest.importorskip("zensical", reason="the extra `docs` is not installed")

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "build_site.py"))
ELSEWHERE = re.compile(r"""(?:url\(|@import )["']?(?:https?:)?//""")  # in a style sheet
# What a browser loads by itself.  A link may lead anywhere.
LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "srcset"}


class Page(HTMLParser):
    """What a page loads, where its links lead, and its anchors."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.anchors = {""}
        self.navigation: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag in LOADED and LOADED[tag] in given:
            self.loaded.append(given[LOADED[tag]])
        if tag == "a" and "href" in given:
            is_navigation = "md-nav__link" in given.get("class", "")
            (self.navigation if is_navigation else self.links).append(given["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the site, which a build made that stops at a warning."""
    folder = tmp_path_factory.mktemp("site")
    assert SCRIPT["build"](folder) == 0, "see what was said"
    return Path(folder / SCRIPT["SITE"])


@cache
def page(path: Path) -> Page:
    return Page(path)


def html(site: Path) -> list[Path]:
    return [path for path in site.rglob("*.html") if path.name != "404.html"]


def dead(path: Path, links: list[str]) -> list[str]:
    """Return those of a page's links that lead to no file of the site, or to no anchor of it."""
    return [link for link in links if not urlsplit(link).scheme and not leads(path, urlsplit(link))]


def leads(path: Path, link: SplitResult) -> bool:
    target = (path.parent / unquote(link.path)).resolve() if link.path else path
    if target.suffix == ".html" and target.is_file():
        return unquote(link.fragment) in page(target).anchors
    return target.is_file()


def test_every_link_and_picture_leads_to_something_on_the_site(site: Path) -> None:
    assert len(html(site)) > 50
    found = {
        str(path.relative_to(site)): dead(path, [*one.loaded, *one.links, *one.navigation])
        for path in html(site)
        for one in [page(path)]
    }
    assert {name: links for name, links in found.items() if links} == {}


def test_a_page_loads_nothing_from_another_host(site: Path) -> None:
    loaded = {link for path in html(site) for link in page(path).loaded}
    assert loaded
    assert [link for link in loaded if urlsplit(link).scheme or urlsplit(link).netloc] == []
    assert not [path for path in site.rglob("*.css") if ELSEWHERE.search(path.read_text())]
    # The theme draws this kind of diagram by a script that it loads from a host.
    assert not [path for path in html(site) if 'class="mermaid"' in path.read_text()]


def test_every_page_is_in_the_navigation(site: Path) -> None:
    start = site / "docs" / "index.html"
    shown = {(start.parent / link).resolve() for link in page(start).navigation}
    assert [str(path.relative_to(site)) for path in html(site) if path not in shown] == []


def test_the_page_of_decisions_lists_each_of_them(site: Path) -> None:
    folder = site / "docs" / "decisions"
    written = sorted(ROOT.glob("docs/decisions/[0-9]*.md"))
    listed = [link for link in page(folder / "index.html").links if link[0].isdigit()]
    assert listed == [f"{path.stem}.html" for path in written]


@pytest.mark.parametrize("mistake", ["[x](no.md)", "[x](index.md#no)", "![x](no.svg)"])
def test_a_dead_link_is_found(mistake: str, site: Path) -> None:
    """By the last line of defence, which needs no build."""
    link = mistake.partition("(")[2].rstrip(")").replace(".md", ".html")
    assert dead(site / "docs" / "index.html", [link]) == [link]


def test_a_warning_ends_the_build(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "zensical.toml").write_text('[project]\nsite_name = "x"\n')
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# X\n\n[x](no.md)\n")
    assert SCRIPT["run"](tmp_path) != 0
    assert "page does not exist" in capfd.readouterr().err
