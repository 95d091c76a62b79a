"""How time and memory grow: with the number of rows in data, store and weights, and with the team size in training.

Rows: the stages `data` and `weights`, and the reading part of `train`, on the demo's corpus at iteration 3. Scores come
from a formula; `bench.scoring` measures a model's own time and memory. Memory is what a process needs beyond imports.
Team: a training step at the shape, in seconds per triplet and peak memory. Memory is measured again with freed blocks
returned at once, which is slower, but shows what training holds rather than how the allocator's free blocks happen to
fit.
"""

from __future__ import annotations

import argparse
import ctypes
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import ratio, training
from bench.rows import SHAPES

COUNTS = (1_000, 10_000, 100_000)
TEAMS = (1, 2, 3, 5)
MEMBERS = 3
M_MMAP_THRESHOLD = -3  # from <malloc.h>


def rows(arguments: argparse.Namespace) -> dict[str, float]:
    import pyarrow.parquet as pq

    from tpaw_core.artifacts import checkpoint
    from tpaw_core.artifacts.synthetic import write_synthetic
    from tpaw_core.artifacts.team import Member, Team, write_team
    from tpaw_core.config import params_file
    from tpaw_core.data import prepare
    from tpaw_core.data.endings import Response
    from tpaw_core.engine import scoring, scratch
    from tpaw_core.stages.context import Context
    from tpaw_core.stages.encode import encode
    from tpaw_core.stages.weights import weights
    from tpaw_core.workspace import files
    from tpaw_core.workspace.paths import Workspace

    params = params_file.load(Path("recipes/demo.yaml"))
    params = params.model_copy(
        update={"data": params.data.model_copy(update={"max_train_rows": arguments.rows, "max_heldout_rows": 100})}
    )
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(Path(folder))
        context = Context(workspace, params)
        scoring.batches = (
            lambda model, pairs, **_: (  # type: ignore[assignment]
                (range(i, min(i + 256, len(pairs))), [-0.5 * len(r) for _, r in pairs[i : i + 256]])
                for i in range(0, len(pairs), 256)
            )
        )
        before = ratio.peak_memory()

        started = time.perf_counter()
        prepare.prepare(workspace, params.data, params.seed)
        seconds["data"] = time.perf_counter() - started

        started = time.perf_counter()
        encode(context)
        encoded = context.encoded()
        seconds["encode"] = time.perf_counter() - started

        assert params.model.scratch is not None
        tokenizer = checkpoint.load_tokenizer(workspace.tokenizer)
        model = scratch.model(params.model.scratch, tokenizer, max_length=160, seed=0)
        for number in range(MEMBERS):
            at = workspace.checkpoint(number)
            at.mkdir(parents=True)
            model.save_pretrained(at)
            tokenizer.save_pretrained(at)
            (at / "number").write_text(str(number))
            checkpoint.seal(at, number, checkpoint.Origin())

        draw = random.Random(0)
        started = time.perf_counter()
        members = []
        for number in range(MEMBERS):
            path = workspace.synthetic(number + 1)
            path.parent.mkdir(exist_ok=True)
            answers = [
                Response([draw.randrange(3, 300) for _ in range(draw.randint(10, 30))], "stop") for _ in encoded.prompts
            ]
            rows, digest = context.playing(), context.encoded_digest
            write_synthetic(path, number + 1, "0" * 64, rows, encoded, answers, tokenizer, digest)
            members.append(
                Member(
                    iteration=number,
                    version=1,
                    digest=checkpoint.manifest(workspace, number).digest,
                    checkpoint=workspace.name(workspace.checkpoint(number)),
                    synthetic=workspace.name(path),
                    synthetic_sha256=files.sha256(path),
                )
            )
        seconds["synthetic"] = (time.perf_counter() - started) / MEMBERS
        del answers, encoded
        for t in (1, 2, 3):
            write_team(workspace, Team(iteration=t, policy="latest", players=t, members=members[:t][::-1]))

        started = time.perf_counter()
        weights(context, 3)
        seconds["weights"] = time.perf_counter() - started
        started = time.perf_counter()
        weights(context, 3)
        seconds["weights, all known"] = time.perf_counter() - started
        assert pq.read_metadata(workspace.weights(3)).num_rows == MEMBERS * arguments.rows
    return {**seconds, "memory": ratio.peak_memory() - before}


def team(arguments: argparse.Namespace) -> dict[str, float]:
    return training.ours(arguments)


def held(arguments: argparse.Namespace) -> dict[str, float]:
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)
    return {"memory held": training.ours(arguments)["memory"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ratio.add_shape(parser)
    parser.add_argument("--rows", type=int, default=0)
    if not (arguments := ratio.run("bench.growth", {"rows": rows, "team": team, "held": held}, parser)):
        return
    sides = {f"{count} rows": {"side": "rows", "rows": count} for count in COUNTS}
    sides |= {f"team of {size}": {"side": "team", "team": size} for size in TEAMS}
    sides |= {f"team of {size}, held": {"side": "held", "team": size} for size in TEAMS}
    found = ratio.in_turn(arguments, sides)
    middle = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()
    }
    one = {**middle["team of 1"], **middle["team of 1, held"]}
    growth: dict[str, Any] = {}
    for size in TEAMS[1:]:
        own = {**middle[f"team of {size}"], **middle[f"team of {size}, held"]}
        growth[f"team of {size} to team of 1"] = {
            "seconds a triplet": one["triplets_per_second"] / own["triplets_per_second"],
            **{what: own[what] / one[what] for what in ("memory", "memory held")},
        }
    name = f"growth-{arguments.shape}-{arguments.dtype}"
    ratio.write({"name": name, "figures": middle, "ratio": growth}, shape=SHAPES[arguments.shape].__dict__)
    for what, figures in {**middle, **growth}.items():
        print(f"{what}: " + ", ".join(f"{key} {value:.3g}" for key, value in figures.items()), flush=True)


if __name__ == "__main__":
    main()
