"""Writes the table of README.md from what a test run counted.

    FASTDINO_PROMISES=counts.jsonl python -m pytest tests/reliability
    python tests/reliability/table.py counts.jsonl [--nightly]

One line per goal: what is promised, cases tried and cases that held. ``--nightly`` writes the column of the
nightly run instead of that of every run; the other column stays.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- written by table.py -->\n", "<!-- end -->"
HEAD = "| | promise | every run: held / tried | nightly: held / tried |\n|---|---|---|---|\n"
ROW = re.compile(r"^\| (\d+) \| (.*) \| ([^|]*) \| ([^|]*) \|$", re.M)
NONE = "not run"
PROMISES = {
    1: "Killed at random times, also inside saves: the final weights are those of an undisturbed run",
    2: "A save interrupted at any operation or by a power cut that loses unflushed writes: old or new",
    3: "Full disk, quota, I/O error, read-only: the checkpoint before stays, errno, path and bytes are told",
    4: "Flipped bits, zeroed pages, cuts, swapped or missing files: found before a tensor is used; fallback",
    5: "Signals to ranks, launcher or group, in a step or a save: saved, and continued bitwise",
    6: "Resuming at any step, several times an epoch, at its end: no image twice or left out",
    7: "Other numbers of processes: the same images and crops at every step",
    8: "Threads of loader and kernels change no byte",
    9: "A run whose settings or data changed is refused, with the difference",
    10: "Checkpoints of every release load, and their next step is the recorded one",
    11: "A process that hangs in any phase is named; all stop; the run continues bitwise",
    12: "A process that fails ends the others; its error comes first; nothing stays behind",
    13: "A slow process is named, and none without reason",
    14: "NaN or infinity anywhere: the step changes no byte on any process; several in a row stop the run",
    15: "State that is not finite never becomes a checkpoint",
    16: "Steps computed twice and compared",
    17: "Broken images: no crash, no long wait, bounded memory, the same replacements everywhere",
    18: "Images too large, with too many scans or frames: refused from the header",
    19: "Readers that fail, stall or change: repeated or replaced; closing does not wait for them",
    20: "1,281,167 images: list, shuffle and seek in bounded time and memory",
    21: "Folders with loops, pipes, sockets, devices, great depth",
    22: "File names with any bytes: exact in lists, logs, report and resume; no forged log line",
    23: "One run per output folder, among simultaneous starts and after kills",
    24: "Output folders that cannot be written are found before any work",
    25: "Wall clocks that jump and scrambled file times change nothing",
    26: "Retention never removes the last valid checkpoint",
    27: "Memory, files and threads stay constant over thousands of steps",
    28: "Hostile pickles, .pth, arrays, YAML: refused, no code runs, bounded memory",
    29: "Hostile tar archives: nothing is written anywhere",
    30: "Markup in names, labels and settings stays text in every page",
    31: "Secrets of environment and command line reach no output",
    32: "Packages locked by hash, wheels that repeat to the byte, no network",
    33: "Every C and Triton operation on strided, empty, misaligned, non-finite, impossible arguments",
}


def counted(path: Path) -> dict[int, tuple[int, int]]:
    """Goal -> cases that held and cases tried."""
    sums: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    for record in map(json.loads, path.read_text("utf-8").splitlines()):
        sums[record["goal"]][0] += record["passed"]
        sums[record["goal"]][1] += record["tried"]
    return {goal: (held, tried) for goal, (held, tried) in sums.items()}


def table(counts: dict[int, tuple[int, int]], nightly: bool, before: str) -> str:
    """The rows, with the column that was not counted as it is in the text ``before``."""
    old = {int(goal): (every, night) for goal, _, every, night in ROW.findall(before)}
    rows = []
    for goal, promise in PROMISES.items():
        columns = list(old.get(goal, (NONE, NONE)))
        columns[nightly] = "{:,} / {:,}".format(*counts[goal]) if goal in counts else NONE
        rows.append(f"| {goal} | {promise} | {columns[0]} | {columns[1]} |\n")
    return HEAD + "".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("counts", type=Path)
    parser.add_argument("--nightly", action="store_true")
    args = parser.parse_args()
    text = README.read_text("utf-8")
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    new = table(counted(args.counts), args.nightly, text[begin:end])
    README.write_text(text[:begin] + new + text[end:], "utf-8")


if __name__ == "__main__":
    main()
