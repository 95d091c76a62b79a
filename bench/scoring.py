"""Scoring, in triplets per second: every response to a team's prompts, against TRL's reference log-probabilities.

--peer pairs: the same computation without TRL.
"""

from __future__ import annotations

import argparse
import tempfile
import time

from bench import ratio
from bench.rows import DEVICE, SHAPES, groups, model


def ours(arguments: argparse.Namespace) -> dict[str, float]:
    from tpaw_core.engine import scoring

    shape = SHAPES[arguments.shape]
    pairs = [(prompt, ids) for prompt, responses in groups(shape, arguments.team) for ids in responses]
    frozen, bf16 = model(shape), arguments.dtype == "bf16"
    scoring.score(frozen, pairs[:4], pad_id=0, bf16=bf16)
    started = time.perf_counter()
    scoring.score(frozen, pairs, pad_id=0, bf16=bf16)
    return _figures(arguments, started)


def trl(arguments: argparse.Namespace) -> dict[str, float]:
    from bench import peer

    shape = SHAPES[arguments.shape]
    pairs = peer.pairs(shape, arguments.team)
    with tempfile.TemporaryDirectory() as state:
        trainer = peer.trainer(model(shape), shape, state, bf16=arguments.dtype == "bf16")
        trainer._precompute_ref_logps(pairs.select(range(2)), "warm", shape.peer_batch)
        started = time.perf_counter()
        trainer._precompute_ref_logps(pairs, "train", shape.peer_batch)
        return _figures(arguments, started)


def pairs(arguments: argparse.Namespace) -> dict[str, float]:
    import torch

    from bench import plain

    shape = SHAPES[arguments.shape]
    rows = [
        (prompt, ids)
        for prompt, (chosen, *responses) in groups(shape, arguments.team)
        for rejected in responses
        for ids in (chosen, rejected)
    ]
    frozen = model(shape)
    with torch.inference_mode(), torch.autocast(DEVICE, torch.bfloat16, enabled=arguments.dtype == "bf16"):
        plain.logps(frozen, rows[:4])
        started = time.perf_counter()
        for start in range(0, len(rows), 2 * shape.peer_batch):
            plain.logps(frozen, rows[start : start + 2 * shape.peer_batch]).tolist()
        return _figures(arguments, started)


def _figures(arguments: argparse.Namespace, started: float) -> dict[str, float]:
    triplets = SHAPES[arguments.shape].prompts * arguments.team
    return {"triplets_per_second": triplets / (time.perf_counter() - started), "memory": ratio.peak_memory(DEVICE)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ratio.add_shape(parser)
    parser.add_argument("--peer", choices=["trl", "pairs"], default="trl")
    if arguments := ratio.run("bench.scoring", {"ours": ours, "trl": trl, "pairs": pairs}, parser):
        ratio.against(arguments, "scoring")


if __name__ == "__main__":
    main()
