"""The third iteration of a finished demo, repeated: answers, references of a team of three, training for one epoch.

Ours: the engine, with the score store as iteration 2 left it. The peer: transformers' padded loop, then TRL's
DPOTrainer. Each of the three checkpoints computes references on all pairs, but training uses only one set, because
DPOTrainer takes no more. Both sides train for the same number of steps. Models and rows are in memory. Evaluation is
the same on both sides and is not measured. Run `make demo` first; the first --prompts of its rows are used.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

from bench import ratio
from bench.rows import DEVICE, SHAPES

LAMBDA, ETA, GAMMA, BATCH = 0.1, 6.0, 0.5, 32
MOST, SAMPLING_BATCH = 40, 500  # new tokens, and prompts per batch, as in the demo


class Start(NamedTuple):
    """What iteration 3 starts from: rows, the answers of opponents 1 and 0, and checkpoints 2, 1 and 0."""

    tokenizer: Any
    prompts: list[list[int]]
    targets: list[list[int]]
    older: list[list[list[int]]]
    players: list[Any]


def start(arguments: argparse.Namespace) -> Start:
    import pyarrow.parquet as pq

    from tpaw_core.artifacts import checkpoint
    from tpaw_core.artifacts.encoded import read_encoded
    from tpaw_core.workspace.paths import Workspace

    folder = Path(arguments.workspace)
    if not (folder / "checkpoints" / "2").exists():
        raise SystemExit(f"{folder}: no finished demo here; run `make demo` first, or give --workspace")
    tokenizer = checkpoint.load_tokenizer(folder / "checkpoints" / "2")
    encoded = read_encoded(Workspace(folder), "train", arguments.prompts)
    older = []
    for opponent in (1, 0):
        table = pq.read_table(folder / "synthetic" / f"{opponent + 1}.parquet").to_pydict()
        answers = dict(zip(table["prompt_id"], table["rejected_ids"], strict=True))
        older.append([answers[name] for name in encoded.row_ids])
    players = [checkpoint.load_model(folder / "checkpoints" / str(number)) for number in (2, 1, 0)]
    return Start(tokenizer, [*map(list, encoded.prompts)], [*map(list, encoded.chosen)], older, players)


def ours(arguments: argparse.Namespace) -> dict[str, float]:
    from tpaw_core.artifacts.score_store import Request, ScoreStore, keys
    from tpaw_core.data.endings import Ending
    from tpaw_core.data.tokens import TokenRows
    from tpaw_core.engine import scoring
    from tpaw_core.engine.generation import in_process
    from tpaw_core.engine.training import loop
    from tpaw_core.engine.training.batches import Groups
    from tpaw_core.method.player_weights import player_weights

    tokenizer, prompts, targets, older, players = start(arguments)
    bf16, pad_id = arguments.dtype == "bf16", tokenizer.pad_token_id
    ending = Ending(tokenizer.eos_token_id, (tokenizer.eos_token_id,))
    settings: Any = SimpleNamespace(
        learning_rate=3e-4, num_train_epochs=1, train_batch_size=BATCH, sharded=False,
        max_tokens=4096, optim="adamw_torch", weight_decay=0.0, lr_scheduler_type="linear", warmup_ratio=0.1,
        max_grad_norm=1.0, bf16=bf16, activation_checkpointing=False, logging_steps=10, save_steps=20,
    )  # fmt: skip
    sampling: Any = SimpleNamespace(max_new_tokens=MOST, temperature=1.0, top_p=1.0, batch_size=SAMPLING_BATCH)
    known = [(p, ids) for rows in (targets, *older) for p, ids in zip(prompts, rows, strict=True)]
    with tempfile.TemporaryDirectory() as folder:

        def stores() -> list[ScoreStore]:
            return [ScoreStore(Path(folder), str(number), "scores") for number in range(len(players))]

        for store, player in list(zip(stores(), players, strict=True))[1:]:
            store.scores(known, lambda some, by=player: scoring.batches(by, some, pad_id=pad_id, bf16=bf16))
        team = stores()
        started = time.perf_counter()
        limits: Any = {"max_length": 160, "ending": ending, "pad_id": pad_id, "seed": 1}
        answers = [response.ids for response in in_process.generate(players[0], prompts, sampling, **limits)]
        pairs = known[: len(prompts)] + list(zip(prompts, answers, strict=True)) + known[len(prompts) :]
        request = Request.of(keys(pairs))
        table, new = [], 0
        for store, player in zip(team, players, strict=True):
            if player is not players[0]:
                store.scores(known, lambda some: [])
            values, count = store.scores(
                pairs, lambda some, by=player: scoring.batches(by, some, pad_id=pad_id, bf16=bf16), request
            )
            table.append(values)
            new += count
        scores = np.array(table).T
        chosen, rejected = np.tile(scores[: len(prompts)], (3, 1)), scores[len(prompts) :]
        beta = player_weights(chosen, rejected, gamma=GAMMA, scale=LAMBDA)
        cube = (3, len(prompts), 3)
        loop.self_play(
            players[0],
            Groups(
                TokenRows(prompts),
                TokenRows(targets),
                [TokenRows(answers), *map(TokenRows, older)],
                scores[: len(prompts)],
                rejected.reshape(cube),
                beta.reshape(cube),
            ),
            SimpleNamespace(name="tpaw", lambda_=LAMBDA, eta=ETA, history=0.0, per_token=False),  # type: ignore[arg-type]
            settings,
            pad_id=pad_id,
            seed=0,
            state=Path(folder, "state"),
            on_log=lambda step, metrics: None,
        )
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "memory": ratio.peak_memory(DEVICE), "scored": new / len(prompts)}


def trl(arguments: argparse.Namespace) -> dict[str, float]:
    from datasets import Dataset

    from bench import generation, peer

    tokenizer, prompts, targets, older, players = start(arguments)
    shape, bf16 = SHAPES["short"], arguments.dtype == "bf16"
    started = time.perf_counter()
    with torch.inference_mode():
        answers = [
            ids
            for i in range(0, len(prompts), SAMPLING_BATCH)
            for ids in generation.transformers_loop(
                players[0], prompts[i : i + SAMPLING_BATCH], MOST, tokenizer.eos_token_id, tokenizer.pad_token_id
            )
        ]
    pairs: Any = Dataset.from_list(
        [
            {"prompt_ids": p, "chosen_ids": y, "rejected_ids": g}
            for opponent in (answers, *older)
            for p, y, g in zip(prompts, targets, opponent, strict=True)
        ]
    )
    with tempfile.TemporaryDirectory() as state:
        for player in players[::-1]:
            trainer = peer.trainer(
                player, shape, state, bf16=bf16, beta=LAMBDA, learning_rate=3e-4, warmup_steps=0.1, num_train_epochs=1,
                gradient_accumulation_steps=3 * BATCH // shape.peer_batch,
            )  # fmt: skip
            scored = trainer._precompute_ref_logps(pairs, "train", shape.peer_batch)
        trainer.train_dataset = scored
        trainer.train()
    return {"seconds": time.perf_counter() - started, "memory": ratio.peak_memory(DEVICE)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workspace", default=".")
    parser.add_argument("--dtype", choices=["float32", "bf16"], default="float32")
    parser.add_argument("--prompts", type=int, default=1000)
    if arguments := ratio.run("bench.iteration", {"ours": ours, "trl": trl}, parser):
        found = ratio.in_turn(arguments, {"ours": {}, "trl": {}})
        name, peer = f"iteration-demo-{arguments.dtype}", "transformers' loop and TRL DPOTrainer"
        rates = [[1 / figures["seconds"] for figures in side] for side in found.values()]
        scored = found["ours"][0]["scored"]
        ratio.report(name, "iterations/s", *rates, peer_name=peer, pairs_scored_a_prompt={"ours": scored, "peer": 18})
        memory = [[figures["memory"] for figures in side] for side in found.values()]
        ratio.report(f"{name}-memory", "GB", *memory, peer_name=peer)


if __name__ == "__main__":
    main()
