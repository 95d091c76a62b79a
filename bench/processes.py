"""Training on two processes of one thread, replicated and sharded, beside one process with two threads.

Steps per second, and how far the losses are apart: on a machine with two cores, what it costs to be several processes.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import ratio
from bench.rows import SHAPES, groups, model

STEPS, TEAM = 12, 3
SIDES: dict[str, dict[str, Any]] = {"one": {}, "replicated": {"processes": 2}, "sharded": {"processes": 2}}


def timed(policy: Any, *, on_log: Any, **options: Any) -> list[dict[str, float]]:
    """`self_play` on one rank; the log ends with the seconds per step, without the first two."""
    from tpaw_core.engine.training import loop

    seen: list[float] = []

    def record(step: int, metrics: dict[str, float]) -> None:
        seen.append(time.monotonic())
        on_log(step, metrics)

    log = loop.self_play(policy, on_log=record, **options)
    return [*log, {"seconds": (seen[-1] - seen[1]) / (len(seen) - 2)}]


def side(arguments: argparse.Namespace) -> dict[str, float]:
    from bench import processes as own
    from tpaw_core.config.machine import Machine
    from tpaw_core.config.optimisation import Optimisation
    from tpaw_core.config.params import Objective
    from tpaw_core.engine.training.batches import Group
    from tpaw_core.launch import training
    from tpaw_core.launch.source import Source

    shape = SHAPES[arguments.shape]
    processes = SIDES[arguments.side].get("processes", 1)
    os.environ["OMP_NUM_THREADS"] = str(2 // processes)
    rows = [
        Group(prompt, chosen, rejected, [-50.0] * TEAM, [[-60.0] * TEAM] * TEAM, [[1 / TEAM] * TEAM] * TEAM)
        for prompt, (chosen, *rejected) in groups(shape, TEAM)
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model(shape).save_pretrained(folder / "model")
        steps: Any = {"learning_rate": 1e-5, "num_train_epochs": STEPS, "train_batch_size": len(rows)}
        _, log = training.train(
            Machine(processes=processes),
            folder,
            Source(str(folder / "model")),
            own.timed,  # which the other processes find by this name
            Optimisation(**steps, sharded=arguments.side == "sharded", logging_steps=1, save_steps=1000),
            lambda step, metrics: None,
            groups=rows,
            objective=Objective.model_validate({}),
            pad_id=0,
            seed=0,
            state=folder / "state",
        )
    return {"steps_per_second": 1 / log[-1]["seconds"], "first": log[0]["loss"], "last": log[-2]["loss"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ratio.add_shape(parser)
    if arguments := ratio.run("bench.processes", dict.fromkeys(SIDES, side), parser):
        found = ratio.in_turn(arguments, {name: {} for name in SIDES})
        speed = {name: [figures["steps_per_second"] for figures in side] for name, side in found.items()}
        for name in ("replicated", "sharded"):
            apart = max(
                abs(ours[step] / theirs[step] - 1)
                for ours, theirs in zip(found[name], found["one"], strict=True)
                for step in ("first", "last")
            )
            what = f"processes-{arguments.shape}-{name}"
            ratio.report(what, "steps/s", speed[name], speed["one"], peer_name="one process, two threads", apart=apart)
            print(f"{what}: losses of the first and last step are {apart:.1e} apart", flush=True)


if __name__ == "__main__":
    main()
