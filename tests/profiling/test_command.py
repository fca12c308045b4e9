"""`lfm2kit profile`: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lfm2kit.records import values
from tests.checkpoint.typed import Cli
from tests.records.validating import faults

FORWARD = ("profile", "-b", "reference", "-n", "2", "--seq-len", "4", "-r", "2")


def test_a_profile_is_shown_and_written(cli: Cli, random_folder: Path, tmp_path: Path) -> None:
    record, trace = tmp_path / "record.json", tmp_path / "trace.json"
    done = cli(*FORWARD, "-m", random_folder, "--json", record, "--trace", trace)
    assert done.code == 0, done.err
    assert "reference: a forward of 2 samples of 4 tokens takes" in done.out
    assert "between blocks" in done.out
    written = json.loads(record.read_text(encoding="utf-8"))
    assert faults(written) == []
    forwards = 2 * written["groups"]
    assert len(values(written, "time")) == len(values(written, "time with marks")) == forwards
    assert len(written["parts"]) == 42
    assert written["parts"][3]["name"] == "layers.0.ffn_norm"
    assert {kind["kind"] for kind in written["kinds"]} >= {"experts", "router", "attn"}
    assert json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]


def test_a_step_is_named(cli: Cli, random_folder: Path) -> None:
    done = cli(*FORWARD, "-m", random_folder, "--decode", "--json", "-")
    assert done.code == 0, done.err
    assert json.loads(done.out)["test"] == "a step of 2 sequences after 4 tokens"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("-n", "0"), "-n 0"),
        (("-r", "0"), "--repetitions 0"),
        (("--trace", "no/such/trace.json"), "--trace no/such"),
        (("--trace", "same.json", "--json", "same.json"), "same.json"),
        (("--trim", "--decode"), "--decode"),
        (("--trim", "--html", "page.html"), "leave out --trim"),
        (("--ranks", "0"), "--ranks 0"),
        (("--ranks", "2", "--errors"), "--errors compares the blocks of one process"),
        (("--ranks", "2", "--decode", "-n", "1"), "give -n 2 or more"),
        (("--ranks", "2", "--ep-size", "3"), "2 ranks cannot form groups of 3"),
        (("--ranks", "2", "--independent"), "--independent runs alone"),
        (("--ranks", "2", "--html", "/dev/stdout"), "--html /dev/stdout"),
        (("--ranks", "2", "--transport", "pigeon"), "unknown transport 'pigeon'"),
    ],
)
def test_bad_input_is_one_line(
    given: tuple[str, ...], says: str, cli: Cli, random_folder: Path
) -> None:
    cli("profile", "-b", "reference", "-m", random_folder, *given).assert_fails(says)


class Elements(HTMLParser):
    """Notes the elements of a page that are never closed, and what it would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.titles: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [str(value) for name, value in attrs if name in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["h2"]:
            self.titles.append(data)


def test_a_page_has_every_picture_and_loads_nothing(
    cli: Cli, random_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "page.html"
    done = cli(
        *FORWARD[:2], "cpu_simd", *FORWARD[3:], "-m", random_folder, "--html", file, "--errors"
    )
    assert done.code == 0, done.err
    text, page = file.read_text(encoding="utf-8"), Elements()
    page.feed(text)
    assert page.titles == ["Layers", "Roofline", "Time line", "Experts", "Errors"]
    assert (page.open, page.loads) == ([], [])
    assert "EQUAL: all 36 blocks are as near" in done.out
    embedded = text.partition('id="record">')[2].partition("</script>")[0]
    assert faults(json.loads(embedded)) == []
    record = json.loads(embedded)
    assert len(record["errors"]) == 36
    loads = record["expert_loads"]
    assert {layer: sum(load) for layer, load in loads.items()} == {
        str(layer): 2 * 4 * 4
        for layer in range(2, 8)  # samples, tokens, experts of each
    }


def test_a_name_with_markup_is_text_in_the_page(
    cli: Cli, random_folder: Path, tmp_path: Path
) -> None:
    folder, file = tmp_path / "<script>alert(1)<", tmp_path / "page.html"
    folder.symlink_to(random_folder)
    assert cli(*FORWARD, "-m", folder, "--html", file).code == 0
    assert "<script>alert" not in file.read_text(encoding="utf-8")
