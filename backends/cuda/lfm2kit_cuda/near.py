"""Which of the machine's cores are close to a GPU: those of its NUMA node."""

from __future__ import annotations

from pathlib import Path


def cores_near(bus_id: str, root: Path = Path("/")) -> frozenset[int]:
    """Return the cores that Linux calls local to a PCI device; none if it does not say.

    `bus_id` is the device's, as CUDA writes it: "0000:1B:00.0".
    """
    path = root / "sys/bus/pci/devices" / bus_id.lower() / "local_cpulist"
    try:
        text = path.read_text(encoding="ascii")
        ranges = [part.split("-") for part in text.strip().split(",") if part]
        return frozenset(n for one in ranges for n in range(int(one[0]), int(one[-1]) + 1))
    except (OSError, ValueError):
        return frozenset()
