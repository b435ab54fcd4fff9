"""Rewrites the results in ``bench/README.md`` from ``bench/results``: ``python -m bench.results_table``."""

from __future__ import annotations

import json
from pathlib import Path

HERE = Path(__file__).parent
START, END = "<!-- results: begin -->", "<!-- results: end -->"


def markdown(results: Path) -> str:
    """One section per result file, newest first within a device."""
    parts = []
    for path in sorted(results.glob("*/*.json"), key=lambda p: (p.parent.name, p.name), reverse=True):
        record = json.loads(path.read_text())
        machine = record["machine"]
        parts += [
            f"### {record['claim']}",
            f"{machine['device']}; torch {machine['packages']['torch']}; commit {machine['commit']}; "
            f"[{path.name}](results/{path.parent.name}/{path.name})",
            "```text\n" + "\n".join(record["transcript"]) + "\n```",
        ]
    return "\n\n".join(parts)


def main() -> None:
    readme = HERE / "README.md"
    before, _, rest = readme.read_text().partition(START)
    after = rest.partition(END)[2]
    readme.write_text(f"{before}{START}\n\n{markdown(HERE / 'results')}\n\n{END}{after}")


if __name__ == "__main__":
    main()
