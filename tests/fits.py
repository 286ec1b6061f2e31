#!/usr/bin/env python3
"""README's tables: sizes of files and sessions, and the file to take for a machine.

    make build/bench && python3 tests/fits.py

Asks build/bench for its plans (no weights are made).  A machine of 8 GB has 2^33 bytes:
1.5 GB are left to the system, and the rest holds file and session.
"""
import re
import subprocess
from pathlib import Path

BENCH = Path(__file__).resolve().parent.parent / "build" / "bench"
SHAPES, TYPES, CONTEXTS = ("2b", "9b", "27b"), ("bf16", "q8", "q6", "q4", "q3"), (4096, 8192)
SYSTEM = 1.5


def plan(shape, kind):
    """GB of the file and of a session with each context."""
    out = subprocess.run([BENCH, "--shape", shape, "--type", kind, "--plan"], check=True,
                         capture_output=True, text=True).stdout
    return [float(n) for n in re.findall(r"([\d.]+) GB", out)]


def choice(plans, machine, context):
    """q8 if it fits, because it loses nothing.  Otherwise the size to give export.py --size."""
    session = plans["q8"][1 + CONTEXTS.index(context)]
    room = machine * 2 ** 30 / 1e9 - SYSTEM - session
    if plans["q8"][0] <= room:
        return "q8 (%.1f GB)" % (plans["q8"][0] + session)
    if plans["q3"][0] > room:
        return "does not fit"
    return "`--size %gG`" % (int(room * 10) / 10)


def main():
    plans = {shape: {kind: plan(shape, kind) for kind in TYPES} for shape in SHAPES}
    for kind in TYPES:
        print(f"| {kind} |", " | ".join(f"{plans[s][kind][0]:.2f} GB" for s in SHAPES), "|")
    for i, context in enumerate(CONTEXTS):
        print(f"| context of {context:,} |",
              " | ".join(f"{plans[s]['q8'][1 + i]:.2f} GB" for s in SHAPES), "|")
    print("\n| machine | context | 2B | 9B | 27B |\n|---|---|---|---|---|")
    for machine in (8, 16, 32):
        for context in CONTEXTS:
            print(f"| {machine} GB | {context:,} |",
                  " | ".join(choice(plans[s], machine, context) for s in SHAPES), "|")


if __name__ == "__main__":
    main()
