"""Training, triplets a second and peak memory: ours against TRL's DPOTrainer with precomputed references.

A step takes the same rows on both sides, a triplet here is a pair there. The first step is not counted.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import peer, ratio
from bench.rows import SHAPES, groups, model

LAMBDA, ETA = 0.1, 6.0


def ours(arguments: argparse.Namespace) -> dict[str, float]:
    from tpaw_core import config, training

    shape = SHAPES[arguments.shape]
    k = arguments.team
    rows = [
        training.Group(prompt, chosen, rejected, [-50.0] * k, [[-60.0] * k] * k, [[1 / k] * k] * k)
        for prompt, (chosen, *rejected) in groups(shape, k)
    ]
    settings = config.Optimisation(
        learning_rate=1e-5,
        num_train_epochs=1 + shape.steps,
        per_device_train_batch_size=len(rows),
        bf16=arguments.dtype == "bf16",
        logging_steps=1 + shape.steps,
        save_steps=1000 * (1 + shape.steps),
    )
    times: list[float] = []
    with tempfile.TemporaryDirectory() as state:
        training.self_play(
            model(shape),
            rows,
            config.Objective(**{"lambda": LAMBDA, "eta": ETA}),
            settings,
            pad_id=0,
            seed=0,
            state=Path(state),
            on_log=lambda step, metrics: times.append(time.perf_counter()),
        )
    return _figures(times, len(rows) * k * shape.steps)


def trl(arguments: argparse.Namespace) -> dict[str, float]:
    from transformers import TrainerCallback

    shape = SHAPES[arguments.shape]
    pairs = peer.pairs(shape, arguments.team)
    pairs = pairs.add_column("ref_chosen_logps", [-50.0] * len(pairs))
    pairs = pairs.add_column("ref_rejected_logps", [-60.0] * len(pairs))
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as state:
        trainer = peer.trainer(
            model(shape),
            shape,
            state,
            bf16=arguments.dtype == "bf16",
            beta=LAMBDA,
            learning_rate=1e-5,
            num_train_epochs=1 + shape.steps,
            gradient_accumulation_steps=len(pairs) // shape.peer_batch,
        )
        trainer.add_callback(Clock())
        trainer.train_dataset = pairs
        trainer.train()
    return _figures(times, len(pairs) * shape.steps)


def _figures(times: list[float], triplets: int) -> dict[str, float]:
    return {"triplets_per_second": triplets / (times[-1] - times[0]), "memory": ratio.peak_memory()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    ratio.add_shape(parser)
    if (arguments := ratio.run("bench.training", {"ours": ours, "trl": trl}, parser)) is not None:
        ratio.against_trl(arguments, "training")


if __name__ == "__main__":
    main()
