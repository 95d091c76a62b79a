"""The results of all benchmarks as one Markdown table: `python -m bench.table`."""

from __future__ import annotations

import json
from typing import Any

from bench.ratio import RESULTS


def rows() -> list[list[str]]:
    """The results that have a peer, by name."""
    found = []
    for path in sorted(RESULTS.glob("*.json")):
        figures: dict[str, Any] = json.loads(path.read_text())
        if "peer" in figures:
            ratio = figures["ratio"]
            found.append(
                [
                    figures["name"],
                    figures["peer_name"],
                    f"{figures['ours']:.3g}",
                    f"{figures['peer']:.3g}",
                    figures["unit"],
                    f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})",
                ]
            )
    return found


def main() -> None:
    head = ["benchmark", "peer", "ours", "its", "unit", "ratio: median (min-max)"]
    for line in (head, ["---"] * 2 + ["---:"] * 2 + ["---", "---:"], *rows()):
        print("| " + " | ".join(line) + " |")


if __name__ == "__main__":
    main()
