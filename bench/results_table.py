"""Rewrites the results in ``bench/README.md`` from ``bench/results``: ``python -m bench.results_table``; with
``--short FOLDER`` prints one line per measured row of the files there instead.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
START, END = "<!-- results: begin -->", "<!-- results: end -->"


def records(results: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every result file and its content, newest first within a device."""
    for path in sorted(results.glob("*/*.json"), key=lambda p: (p.parent.name, p.name), reverse=True):
        yield path, json.loads(path.read_text())


def markdown(results: Path) -> str:
    """One section per result file, with its pictures."""
    parts = []
    for path, record in records(results):
        machine = record["machine"]
        parts += [
            f"### {record['claim']}",
            f"{machine['device']}; torch {machine['packages']['torch']}; commit {machine['commit']}; "
            f"[{path.name}](results/{path.parent.name}/{path.name})",
            "```text\n" + "\n".join(record["transcript"]) + "\n```",
        ]
        parts += [
            f"![{record['claim']}](results/{picture.parent.name}/{picture.name})"
            for picture in sorted(path.parent.glob(f"{path.stem}*.png"))
        ]
    return "\n\n".join(parts)


def short(results: Path) -> str:
    """What was measured, its median, the speed-up over the first of its kind, the peak of its memory."""
    lines = []
    for _, record in records(results):
        for row in record.get("rows", ()):
            if "median_s" not in row:
                continue
            what = [str(row[k]) for k in ("op", "network", "row", "local", "provider", "dtype") if k in row]
            line = (
                f"{record['claim'].partition('-')[0]:9} {' '.join(what):46} {row['median_s'] * 1e3:10.3f} ms"
            )
            line += f" {row['speedup']:7.2f}x" if "speedup" in row else ""
            lines.append(line + (f" {row['peak_bytes'] / 1e9:7.2f} GB" if "peak_bytes" in row else ""))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    if args.short:
        print(short(args.short))
        return
    readme = HERE / "README.md"
    before, _, rest = readme.read_text().partition(START)
    after = rest.partition(END)[2]
    readme.write_text(f"{before}{START}\n\n{markdown(HERE / 'results')}\n\n{END}{after}")


if __name__ == "__main__":
    main()
