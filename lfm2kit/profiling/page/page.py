"""The page: a heading, what was measured and where, the pictures, and all figures as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from lfm2kit.profiling.page.picture import Picture
from lfm2kit.profiling.page.svg import element

# A picture that is wider than the screen has a shadow where there is more of it.
STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #ffffff; --quiet: #666; --line: #ddd;
        --roof: #b00020; --heat: #b35900; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --paper: #16181c; --quiet: #a0a0a0; --line: #3a3d44; --roof: #ff7b8a;
          --heat: #ffb454; } }
body { margin: 0 auto; max-width: 62rem; padding: 1rem; background: var(--paper);
       color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
figure { margin: 0; overflow-x: auto; background:
  linear-gradient(to right, var(--paper) 30%, transparent) left / 2rem 100% no-repeat local,
  linear-gradient(to left, var(--paper) 30%, transparent) right / 2rem 100% no-repeat local,
  linear-gradient(to right, var(--quiet), transparent) left / 0.7rem 100% no-repeat scroll,
  linear-gradient(to left, var(--quiet), transparent) right / 0.7rem 100% no-repeat scroll; }
svg { width: 100%; min-width: 40rem; height: auto; }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif; }
svg .quiet, .quiet { fill: var(--quiet); color: var(--quiet); } svg .small { font-size: 10px; }
svg .grid { stroke: var(--line); } svg .roof { stroke: var(--roof); stroke-width: 2; }
svg .heat { fill: var(--heat); } svg .within { fill: #0072b2; } svg .beyond { fill: var(--roof); }
svg .ring { fill: none; stroke: var(--ink); }
svg .ideal { stroke: var(--quiet); stroke-dasharray: 5 4; }
svg .border { stroke: var(--ink); stroke-width: 2; }
details div { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.85rem; }
th, td { padding: 0.15rem 0.6rem; border-bottom: 1px solid var(--line); text-align: left; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.1rem 1rem; }
dt { color: var(--quiet); } dd { margin: 0; overflow-wrap: anywhere; }
"""


def page(
    title: str, facts: Mapping[str, str], pictures: Sequence[Picture], record: Mapping[str, Any]
) -> str:
    """Return an HTML document: what is measured, `facts` about it, pictures, and the record."""
    facts_of = [element("dt", escape(k)) + element("dd", escape(v)) for k, v in facts.items()]
    head = element(
        "head",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        element("title", escape(title)),
        element("style", STYLE),
    )
    body = element(
        "body",
        element("h1", escape(title)),
        element("dl", *facts_of),
        *(one.html() for one in pictures),
        element("script", _embedded(record), type="application/json", id="record"),
    )
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _embedded(record: Mapping[str, Any]) -> str:
    """Return JSON that cannot end the element that it stands in."""
    return json.dumps(record, indent=1).replace("<", "\\u003c")
