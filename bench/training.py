"""Training, in triplets per second and peak memory: ours against TRL's DPOTrainer, or against the plain way.

--peer trl: DPOTrainer with precomputed references. pairs: the same without TRL. live: references scored in each step.
A step takes the same rows on both sides: our triplet is the peer's pair. The first step is not counted.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bench import ratio
from bench.rows import DEVICE, SHAPES, groups, model

LAMBDA, ETA = 0.1, 6.0


def ours(arguments: argparse.Namespace) -> dict[str, float]:
    from tpaw_core.engine.training import loop
    from tpaw_core.engine.training.batches import Group

    shape = SHAPES[arguments.shape]
    k = arguments.team
    rows = [
        Group(prompt, chosen, rejected, [-50.0] * k, [[-60.0] * k] * k, [[1 / k] * k] * k)
        for prompt, (chosen, *rejected) in groups(shape, k)
    ]
    settings: Any = SimpleNamespace(  # the fields of Optimisation, whose packages may be missing here
        learning_rate=1e-5,
        num_train_epochs=1 + shape.steps,
        train_batch_size=len(rows),
        sharded=False,
        max_tokens=4096,
        optim="adamw_torch",
        weight_decay=0.0,
        lr_scheduler_type="linear",
        warmup_ratio=0.0,
        max_grad_norm=1.0,
        bf16=arguments.dtype == "bf16",
        activation_checkpointing=False,
        logging_steps=1 + shape.steps,
        save_steps=1000 * (1 + shape.steps),
    )
    times: list[float] = []
    with tempfile.TemporaryDirectory() as state:
        loop.self_play(
            model(shape),
            rows,
            SimpleNamespace(name="tpaw", lambda_=LAMBDA, eta=ETA, history=0.0, per_token=False),  # type: ignore[arg-type]
            settings,
            pad_id=0,
            seed=0,
            state=Path(state),
            on_log=lambda step, metrics: times.append(time.perf_counter()),
        )
    return _figures(times, len(rows) * k * shape.steps)


def trl(arguments: argparse.Namespace) -> dict[str, float]:
    from transformers import TrainerCallback

    from bench import peer

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


def plain(arguments: argparse.Namespace) -> dict[str, float]:
    from bench import plain

    shape, live = SHAPES[arguments.shape], arguments.side == "live"
    times = plain.train(shape, arguments.team, bf16=arguments.dtype == "bf16", live=live, scale=LAMBDA, eta=ETA)
    return _figures(times, shape.prompts * arguments.team * shape.steps)


def _figures(times: list[float], triplets: int) -> dict[str, float]:
    return {"triplets_per_second": triplets / (times[-1] - times[0]), "memory": ratio.peak_memory(DEVICE)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ratio.add_shape(parser)
    parser.add_argument("--peer", choices=["trl", "pairs", "live"], default="trl")
    if arguments := ratio.run("bench.training", {"ours": ours, "trl": trl, "pairs": plain, "live": plain}, parser):
        ratio.against(arguments, "training")


if __name__ == "__main__":
    main()
