"""Training, triplets a second and peak memory: ours against TRL's DPOTrainer with precomputed references.

A step takes the same rows on both sides, a triplet here is a pair there. The first step is not counted.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import ratio
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
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    shape = SHAPES[arguments.shape]
    words = Tokenizer(WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    pairs = [
        {
            "prompt_ids": prompt,
            "chosen_ids": chosen,
            "rejected_ids": g,
            "ref_chosen_logps": -50.0,
            "ref_rejected_logps": -60.0,
        }
        for prompt, (chosen, *rejected) in groups(shape, arguments.team)
        for g in rejected
    ]
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as state:
        trainer = DPOTrainer(
            model(shape),
            args=DPOConfig(
                state,
                beta=LAMBDA,
                learning_rate=1e-5,
                num_train_epochs=1 + shape.steps,
                per_device_train_batch_size=shape.peer_batch,
                gradient_accumulation_steps=len(pairs) // shape.peer_batch,
                bf16=arguments.dtype == "bf16",
                use_cpu=True,
                gradient_checkpointing=False,
                precompute_ref_log_probs=True,
                max_length=None,
                logging_steps=1000,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                seed=0,
            ),
            train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        trainer.train_dataset = Dataset.from_list(pairs)
        trainer.train()
    return _figures(times, len(pairs) * shape.steps)


def _figures(times: list[float], triplets: int) -> dict[str, float]:
    return {"triplets_per_second": triplets / (times[-1] - times[0]), "memory": ratio.peak_memory()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=list(SHAPES), default="long")
    parser.add_argument("--dtype", choices=["float32", "bf16"], default="float32")
    parser.add_argument("--team", type=int, default=3)
    if (arguments := ratio.run("bench.training", {"ours": ours, "trl": trl}, parser)) is None:
        return
    found: dict[str, list[dict[str, float]]] = {"ours": [], "trl": []}
    for _ in range(arguments.repeats):
        for side, figures in found.items():
            figures.append(ratio.measure(arguments, side))
    name = f"training-{arguments.shape}-{arguments.dtype}"
    for what, unit in (("triplets_per_second", "triplets/s"), ("memory", "GB")):
        values = {side: [f[what] for f in figures] for side, figures in found.items()}
        suffix = "" if what == "triplets_per_second" else "-memory"
        ratio.report(name + suffix, unit, values["ours"], values["trl"], peer_name="TRL DPOTrainer")


if __name__ == "__main__":
    main()
