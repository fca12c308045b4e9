"""Sends a signal to many processes, each at another time, and counts how they end.  By hand:

    python tests/cli/sweep_interrupts.py --count 200 --until 2.0 -- lfm2kit run -b reference

What ends otherwise than with one line and 128 + the signal's number is shown.  For the first
hundredths of a second Python itself starts: there the signal kills it, or it shows a traceback.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import time
from collections import Counter


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--until", type=float, default=2.0, help="Seconds after the start.")
    parser.add_argument("--signal", default="SIGINT")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    number = signal.Signals[options.signal]
    codes: Counter[int] = Counter()
    for i in range(options.count):
        moment = options.until * i / options.count
        code, err = ended(options.command, number, moment)
        codes[code] += 1
        said = [line for line in err.splitlines() if line.startswith("lfm2kit: interrupted")]
        if code not in (0, 128 + number) or "Traceback" in err or len(said) != (code != 0):
            print(f"after {moment:.3f} s: exit code {code}\n{err[-500:]}")
    print(", ".join(f"exit code {code}: {count}" for code, count in sorted(codes.items())))


def ended(command: list[str], number: signal.Signals, moment: float) -> tuple[int, str]:
    """Return exit code and stderr of a process that gets a signal after `moment` seconds."""
    job = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8"
    )
    time.sleep(moment)
    job.send_signal(number)
    return job.wait(), job.stderr.read() if job.stderr else ""


if __name__ == "__main__":
    main()
