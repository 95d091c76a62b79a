"""Scoring, triplets a second: every response of a team's prompts, against TRL's computation of reference log-probs."""

from __future__ import annotations

import argparse
import tempfile
import time

from bench import peer, ratio
from bench.rows import SHAPES, groups, model


def ours(arguments: argparse.Namespace) -> dict[str, float]:
    from tpaw_core import scoring

    shape = SHAPES[arguments.shape]
    pairs = [(prompt, ids) for prompt, responses in groups(shape, arguments.team) for ids in responses]
    frozen, bf16 = model(shape), arguments.dtype == "bf16"
    scoring.score(frozen, pairs[:4], pad_id=0, bf16=bf16)
    started = time.perf_counter()
    scoring.score(frozen, pairs, pad_id=0, bf16=bf16)
    return _figures(arguments, started)


def trl(arguments: argparse.Namespace) -> dict[str, float]:
    shape = SHAPES[arguments.shape]
    pairs = peer.pairs(shape, arguments.team)
    with tempfile.TemporaryDirectory() as state:
        trainer = peer.trainer(model(shape), shape, state, bf16=arguments.dtype == "bf16")
        trainer._precompute_ref_logps(pairs.select(range(2)), "warm", shape.peer_batch)
        started = time.perf_counter()
        trainer._precompute_ref_logps(pairs, "train", shape.peer_batch)
        return _figures(arguments, started)


def _figures(arguments: argparse.Namespace, started: float) -> dict[str, float]:
    triplets = SHAPES[arguments.shape].prompts * arguments.team
    return {"triplets_per_second": triplets / (time.perf_counter() - started), "memory": ratio.peak_memory()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    ratio.add_shape(parser)
    if (arguments := ratio.run("bench.scoring", {"ours": ours, "trl": trl}, parser)) is not None:
        ratio.against_trl(arguments, "scoring")


if __name__ == "__main__":
    main()
