"""The sums of a checkpoint's weights, as the heads of an iteration's stages compare them with its manifest.

Ours: files are read side by side, and what was not touched since is not read again. The peer reads every file each
time, one after another. Six heads look at a checkpoint: registry and evaluate when it is new, generate, weights and
train of the next iteration, and weights of the one after.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench import ratio

HEADS = 6


def ours(arguments: argparse.Namespace) -> dict[str, float]:
    from tpaw_core.artifacts import checkpoint
    from tpaw_core.workspace.paths import Workspace

    workspace = Workspace(Path(arguments.folder))
    workspace.sums.unlink(missing_ok=True)
    return _seconds(lambda: checkpoint.verify(workspace, 0))


def peer(arguments: argparse.Namespace) -> dict[str, float]:
    from tpaw_core.artifacts import checkpoint
    from tpaw_core.workspace import files
    from tpaw_core.workspace.paths import Workspace

    workspace = Workspace(Path(arguments.folder))

    def verify() -> None:
        for name, sha in checkpoint.manifest(workspace, 0).files.items():
            if files.sha256(workspace.checkpoint(0) / name) != sha:
                raise SystemExit(f"{name} has changed")

    return _seconds(verify)


def _seconds(head: Callable[[], object]) -> dict[str, float]:
    started = time.perf_counter()
    head()
    first = time.perf_counter() - started
    for _ in range(HEADS - 1):
        head()
    return {"first": first, "all": time.perf_counter() - started}


def main() -> None:
    from tpaw_core.artifacts import checkpoint
    from tpaw_core.workspace import sums
    from tpaw_core.workspace.paths import Workspace

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder")
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--parts", type=int, default=1)
    if not (arguments := ratio.run("bench.sums", {"ours": ours, "peer": peer}, parser)):
        return
    with tempfile.TemporaryDirectory(prefix="tpaw-bench-") as arguments.folder:
        made = Workspace(Path(arguments.folder)).checkpoint(0)
        made.mkdir(parents=True)
        part = bytes(range(256)) * int(arguments.gigabytes * 1e9 / arguments.parts / 256)
        for number in range(arguments.parts):
            (made / f"model-{number}.safetensors").write_bytes(part)
        checkpoint.seal(made, 0, checkpoint.Origin())
        time.sleep(sums.SETTLED / 1e9 + 0.1)
        found = ratio.in_turn(arguments, {"ours": {}, "peer": {}})
    for measured, suffix in (("first", "-first"), ("all", "")):
        seconds = [[figures[measured] for figures in side] for side in found.values()]
        name = f"sums-{arguments.gigabytes:g}gb-{arguments.parts}{suffix}"
        ratio.report(name, "s", *seconds, peer_name="all files read, one by one", heads=HEADS)


if __name__ == "__main__":
    main()
