"""Twenty iterations of a tiny model in one flow: memory, open files and disk use after each, with `prune_after`.

    python -m chaos.endurance [--iterations 20] [--csv FILE]

Prints one line per iteration, and finally the growth from the third iteration to the last.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pandas as pd
import psutil

from tests.support.workspace import COMMANDS, Project

FIRST = 3  # everything that is loaded once has been loaded by then


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tpaw-endurance-") as folder:
        made = Project.make(Path(folder) / "workspace", "sft.num_train_epochs=2", iterations=arguments.iterations)
        try:
            made.up()
            table = observe(made, arguments.iterations)
        finally:
            made.close()
    if arguments.csv:
        table.to_csv(arguments.csv, index=False)
    early, late = table[table["iteration"] == FIRST].iloc[0], table.iloc[-1]
    for name in table.columns[1:]:
        print(f"{name}: {early[name]:.4g} -> {late[name]:.4g}, {100 * (late[name] / early[name] - 1):+.1f}%")


def observe(made: Project, iterations: int) -> pd.DataFrame:
    """One row per iteration: peak resident MB, open files, and MB on disk once its checkpoint has been evaluated."""
    command = [*COMMANDS["flow"], "--param", "prune_after=true"]
    rows, peak = [], dict.fromkeys(("flow MB", "preloaded MB", "worker MB", "flow files", "preloaded files"), 0.0)
    with made.log("repro").open("ab") as log:
        process = psutil.Popen(command, cwd=made.folder, env=made.environment, stdout=log, stderr=subprocess.STDOUT)
    while len(rows) < iterations:
        assert process.poll() is None or (made.folder / f"metrics/{len(rows) + 1}.json").exists(), made.log("repro")
        with suppress(psutil.Error):
            for name, value in _sample(made).items():
                peak[name] = max(peak[name], value)
        # The next iteration's answers exist, so this one has been evaluated and pruned.
        done, last = len(rows) + 1, len(rows) + 1 == iterations
        if (made.folder / f"synthetic/{done + 1}.parquet").exists() or (last and process.poll() is not None):
            size = sum(path.stat().st_size for path in made.folder.rglob("*") if path.is_file() and _ours(made, path))
            rows.append({"iteration": done, **peak, "disk MB": size / 1e6})
            print(*(f"{name} {value:.4g}" for name, value in rows[-1].items()), sep="  ", flush=True)
            peak = dict.fromkeys(peak, 0.0)
        time.sleep(0.1)
    return pd.DataFrame(rows)


def _sample(made: Project) -> dict[str, float]:
    worker = made.service("worker")
    assert worker is not None
    found = {"worker MB": worker.memory_info().rss / 1e6}
    for flow in worker.children():
        found |= {"flow MB": flow.memory_info().rss / 1e6, "flow files": flow.num_fds()}
        for child in flow.children():
            if "preload" in child.cmdline():
                found |= {"preloaded MB": child.memory_info().rss / 1e6, "preloaded files": child.num_fds()}
    return found


def _ours(made: Project, path: Path) -> bool:
    """Whether a run wrote this file; the services' databases and logs do not count."""
    return (
        path.relative_to(made.folder).parts[:2] not in {(".tpaw", "prefect"), (".tpaw", "logs")}
        and path.suffix != ".db"
    )


if __name__ == "__main__":
    main()
