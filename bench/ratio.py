"""Measures two sides in turn, each in its own process; prints their ratio and writes it to bench/results."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench.rows import DEVICE, SHAPES

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "trl", "accelerate")
PEERS = {
    "trl": "TRL DPOTrainer",
    "pairs": "padded pairs, stored references",
    "live": "padded pairs, references scored in each step",
}

Side = Callable[[argparse.Namespace], dict[str, float]]


def processor() -> str:
    if DEVICE == "cuda":
        import torch

        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = {line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")}
    return f"{', '.join(sorted(names)) or platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def peak_memory(device: str = "cpu") -> float:
    """This process's peak use in GB, of main memory or of the accelerator's memory."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def run(module: str, sides: Mapping[str, Side], parser: argparse.ArgumentParser) -> argparse.Namespace | None:
    """In a measuring process, measure the requested side and return None. Otherwise, return the arguments."""
    parser.add_argument("--side", choices=list(sides), help=argparse.SUPPRESS)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.side is None:
        arguments.module = module
        return arguments
    print(json.dumps(sides[arguments.side](arguments)))
    return None


def measure(arguments: argparse.Namespace, side: str, **changes: Any) -> dict[str, float]:
    """Measure one side in a new process."""
    options = {k: v for k, v in {**vars(arguments), **changes, "side": side}.items() if k != "module"}
    command = [sys.executable, "-m", arguments.module]
    command += [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}:\n{done.stderr[-3000:]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def in_turn(arguments: argparse.Namespace, sides: Mapping[str, Mapping[str, Any]]) -> dict[str, list[dict[str, float]]]:
    """Measure every side in turn, each with its changes to the arguments, and repeat this ``repeats`` times."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(arguments.repeats):
        for name, changes in sides.items():
            figures = measure(arguments, **{"side": name, **changes})
            found[name].append(figures)
    return found


def report(name: str, unit: str, ours: list[float], peer: list[float], *, peer_name: str, **more: Any) -> None:
    """Print the ratios of ours to the peer, pair by pair, and write them to bench/results/<name>.json."""
    ratios = [a / b for a, b in zip(ours, peer, strict=True)]
    spread = {"min": min(ratios), "median": statistics.median(ratios), "max": max(ratios)}
    figures = {
        "name": name,
        "peer_name": peer_name,
        "unit": unit,
        "ours": statistics.median(ours),
        "peer": statistics.median(peer),
        "ratio": spread,
    }
    write(figures, **more)
    print(
        f"{name}: ours {figures['ours']:.3g}, {peer_name} {figures['peer']:.3g} {unit}, "
        f"ratio {spread['median']:.2f} (min {spread['min']:.2f}, max {spread['max']:.2f})",
        flush=True,
    )


def write(figures: Mapping[str, Any], **more: Any) -> None:
    """Write bench/results/<name>.json, with the versions and the processor it was measured on."""
    known = {**figures, **more, "versions": _versions(), "processor": processor()}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{figures['name']}.json").write_text(json.dumps(known, indent=2) + "\n")


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def add_shape(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=list(SHAPES), default="long")
    parser.add_argument("--dtype", choices=["float32", "bf16"], default="float32")
    parser.add_argument("--team", type=int, default=3)


def against(arguments: argparse.Namespace, what: str) -> None:
    """Measure ours and the peer in turn; report triplets per second and peak memory as two results."""
    found = in_turn(arguments, {"ours": {}, arguments.peer: {}})
    more = {"shape": asdict(SHAPES[arguments.shape]), "team": arguments.team}
    for measured, suffix, unit in (("triplets_per_second", "", "triplets/s"), ("memory", "-memory", "GB")):
        ours, peer = ([figures[measured] for figures in side] for side in found.values())
        name = f"{what}-{arguments.shape}-{arguments.dtype}-{arguments.peer}{suffix}"
        report(name, unit, ours, peer, peer_name=PEERS[arguments.peer], **more)
