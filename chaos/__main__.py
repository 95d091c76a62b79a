"""`make chaos FAULTS=200 SEED=7`: break a small version of the demo again and again, and count what goes wrong.

Needs root, to mount its own file systems. Prints one line per fault, a table by kind, and finally
`faults N kinds K lost L wrong W duplicates D orphans O`; exits with 1 if any of the last four is not 0.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pandas as pd

from chaos.campaign import Campaign, Outcome
from chaos.faults import KINDS, OF_RANKS
from tests.support.workspace import ROOT, Project


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--jobs", type=int, default=2, help="workspaces in parallel")
    parser.add_argument("--processes", type=int, default=1, help="on which stages run; 2 adds kinds that strike them")
    parser.add_argument("--kind", action="append", choices=list(KINDS), help="only this kind; repeatable")
    parser.add_argument("--without-digests", action="store_true", help="skip the digest checks: must fail")
    parser.add_argument("--csv", type=Path, help="write every outcome to this file")
    arguments = parser.parse_args()
    if arguments.without_digests:
        paths = [str(ROOT / "chaos" / "without_digests"), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    draw = random.Random(arguments.seed)
    names = arguments.kind or [kind for kind in KINDS if arguments.processes > 1 or kind not in OF_RANKS]
    kinds: list[str] = []
    while len(kinds) < arguments.faults:
        kinds += draw.sample(names, len(names))
    # Prefect and MLflow start late, because even when idle they slow down everything else.
    kinds = sorted(kinds[: arguments.faults], key=lambda kind: KINDS[kind].services)
    print(f"seed {arguments.seed}: {len(kinds)} faults of {len(set(kinds))} kinds", flush=True)
    jobs = range(min(arguments.jobs, len(kinds)))
    with tempfile.TemporaryDirectory(prefix="tpaw-chaos-") as folder, ThreadPoolExecutor(len(jobs)) as pool:
        shares = [
            pool.submit(
                run, Path(folder) / str(job), kinds[job :: len(jobs)], arguments.seed + 1000 * job, arguments.processes
            )
            for job in jobs
        ]
        table = pd.DataFrame([outcome for share in shares for outcome in share.result()], columns=Outcome._fields)
    if arguments.csv:
        table.to_csv(arguments.csv, index=False)
    for name in ("lost", "wrong"):
        table[name] = (table[name] != "").astype(int)
    table["stopped"] = (table["ended"] != 0).astype(int)
    columns = ["lost", "wrong", "duplicates", "orphans"]
    by_kind = table.groupby("kind").agg(faults=("kind", "size"), **{n: (n, "sum") for n in ("stopped", *columns)})
    print(by_kind.to_string())
    sums = by_kind[columns].sum()
    print(f"faults {len(table)} kinds {len(by_kind)} " + " ".join(f"{name} {sums[name]}" for name in columns))
    return int(sums.any())


def run(folder: Path, kinds: list[str], seed: int, processes: int) -> list[Outcome]:
    """Run one workspace, on its own file system, through its share of the faults."""
    with _disk(folder):
        made = Project.make(folder / "workspace", f"machine.processes={processes}")
        try:
            made.preload()
            made.run("dvc", "repro")
            campaign, outcomes = Campaign(made, seed), []
            for kind in kinds:
                outcomes.append(campaign.suffer(kind))
                print(*outcomes[-1], sep=" | ", flush=True)
            return outcomes
        finally:
            made.close()


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


if __name__ == "__main__":
    sys.exit(main())
