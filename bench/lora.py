"""LoRA beside full fine-tuning: peak memory of scoring and training in one iteration, and what a checkpoint takes.

At the shape of SmolLM2-135M with random weights: RMSProp, activation checkpointing, a team of three, rank 16 on all
linear layers.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from pathlib import Path
from typing import Any

from bench import ratio
from bench.rows import DEVICE, SHAPES, groups, model

TEAM = 3


def side(arguments: argparse.Namespace) -> dict[str, float]:
    """Scores by three players, one epoch against them, and the checkpoint of what was trained, all in one process."""
    import torch

    from tpaw_core.artifacts import adapters
    from tpaw_core.config.optimisation import Optimisation
    from tpaw_core.config.params import Lora, Objective
    from tpaw_core.engine import scoring
    from tpaw_core.engine.training import loop
    from tpaw_core.engine.training.batches import Group

    shape, lora = SHAPES["135m"], arguments.side == "lora"
    rows = groups(shape, TEAM)
    with tempfile.TemporaryDirectory() as name:
        folder, settings = Path(name), Lora(r=16, alpha=32)
        maker = multiprocessing.get_context("spawn").Process(target=_save, args=(folder / "base",))
        maker.start()  # a process of its own, whose memory does not count
        maker.join()
        policy: Any = None
        if lora:
            policy = _load(folder / "base", torch.bfloat16)
            adapters.attach(policy, settings, seed=0)
            adapters.write(policy, folder / "member")
        pairs = [(prompt, response) for prompt, responses in rows for response in responses]
        scores = []
        for player in range(TEAM):
            if lora:
                adapters.use(policy, folder / "member", f"player{player}")
            else:
                policy = None  # before there are two
                policy = _load(folder / "base", torch.float32)
            scores.append(scoring.score(policy, pairs, pad_id=0))
        if lora:  # as `tpaw train` does, in a process of its own
            policy = None
            policy = _load(folder / "base", torch.bfloat16)
            adapters.read(policy, folder / "member")
        table = iter(zip(*scores, strict=True))
        played = []
        for prompt, (chosen, *rejected) in rows:
            on_chosen, *on_rejected = (list(next(table)) for _ in range(1 + TEAM))
            played.append(Group(prompt, chosen, rejected, on_chosen, on_rejected, [[1 / TEAM] * TEAM] * TEAM))
        steps: Any = {"learning_rate": 5e-7, "num_train_epochs": 1, "train_batch_size": 4}
        log = loop.self_play(
            policy,
            played,
            Objective.model_validate({}),
            Optimisation(**steps, optim="rmsprop", activation_checkpointing=True, logging_steps=1),
            pad_id=0,
            seed=0,
            state=folder / "state",
            on_log=lambda step, metrics: None,
        )
        memory = ratio.peak_memory(DEVICE)
        if lora:
            adapters.write(policy, folder / "made")
        else:
            policy.save_pretrained(folder / "made")
        size = sum(path.stat().st_size for path in (folder / "made").iterdir())
    if log[0]["players/0/rewards/chosen"] != 0:
        raise SystemExit(f"{arguments.side}: scoring and training differ by more than rounding")
    return {"memory": memory, "checkpoint": size / 1e6}


def _save(folder: Path) -> None:
    model(SHAPES["135m"]).bfloat16().save_pretrained(folder)


def _load(folder: Path, dtype: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(DEVICE).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    if arguments := ratio.run("bench.lora", {"lora": side, "full": side}, parser):
        found = ratio.in_turn(arguments, {"lora": {}, "full": {}})
        for measured, unit in (("memory", "GB"), ("checkpoint", "MB")):
            ours, peer = ([figures[measured] for figures in side] for side in found.values())
            ratio.report(f"lora-135m-{measured}", unit, ours, peer, peer_name="full fine-tuning", team=TEAM)


if __name__ == "__main__":
    main()
