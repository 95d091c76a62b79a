"""How time and memory of a training step grow with the team: seconds per triplet and peak memory at the shape.

Memory is measured again with freed blocks returned at once, which is slower, but shows what training holds rather than
how the allocator's free blocks happen to fit. How stages grow with the number of rows: `bench.many_rows`.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
from typing import Any

from bench import ratio, training
from bench.rows import SHAPES

TEAMS = (1, 2, 3, 5)
M_MMAP_THRESHOLD = -3  # from <malloc.h>


def team(arguments: argparse.Namespace) -> dict[str, float]:
    return training.ours(arguments)


def held(arguments: argparse.Namespace) -> dict[str, float]:
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)
    return {"memory held": training.ours(arguments)["memory"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ratio.add_shape(parser)
    if not (arguments := ratio.run("bench.growth", {"team": team, "held": held}, parser)):
        return
    sides: dict[str, dict[str, Any]] = {f"team of {size}": {"side": "team", "team": size} for size in TEAMS}
    sides |= {f"team of {size}, held": {"side": "held", "team": size} for size in TEAMS}
    found = ratio.in_turn(arguments, sides)
    middle = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()
    }
    one = {**middle["team of 1"], **middle["team of 1, held"]}
    growth: dict[str, Any] = {}
    for size in TEAMS[1:]:
        own = {**middle[f"team of {size}"], **middle[f"team of {size}, held"]}
        growth[f"team of {size} to team of 1"] = {
            "seconds a triplet": one["triplets_per_second"] / own["triplets_per_second"],
            **{what: own[what] / one[what] for what in ("memory", "memory held")},
        }
    name = f"growth-{arguments.shape}-{arguments.dtype}"
    ratio.write({"name": name, "figures": middle, "ratio": growth}, shape=SHAPES[arguments.shape].__dict__)
    for what, figures in {**middle, **growth}.items():
        print(f"{what}: " + ", ".join(f"{key} {value:.3g}" for key, value in figures.items()), flush=True)


if __name__ == "__main__":
    main()
