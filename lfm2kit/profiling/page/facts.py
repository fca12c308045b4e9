"""What a page or a report says about the machine and the day."""

from __future__ import annotations

import time

from lfm2kit.backend import Context
from lfm2kit.records.machine import described, versions


def facts_of(context: Context) -> dict[str, str]:
    """Return what there is of this machine, with all versions in one line, and the date."""
    ours = versions()
    machine = {name: said for name, said in described(context).items() if name not in ours}
    return {
        **machine,
        "versions": ", ".join(f"{name} {said}" for name, said in ours.items()),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }
