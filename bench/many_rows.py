"""How the stages grow with the number of rows: processor time and peak memory of each, in a process of its own.

Rows are short (about 25 tokens of prompt, 20 of target). Iteration 3 plays against three members. Scores come from a
formula, and training learns nothing: `bench.scoring` and `bench.training` measure a model's own time and memory. Memory
is what a stage needs beyond imports. The ratio is the time per row at the largest count, over that at the smallest.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from bench import ratio

if TYPE_CHECKING:
    from tpaw_core.stages.context import Context

COUNTS = (100_000, 300_000, 1_000_000)
MEMBERS = 3
MODEL = {
    "vocab_size": 400,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
}


def text(number: int) -> tuple[str, str]:
    """A problem that no other number has, and its solution."""
    a, b = divmod(number, 1000)
    asked = f"A farm has {a} cows and {b} sheep, and buys {number} hens. How many animals does it have?"
    return asked, f"{a} + {b} + {number} = {a + b + number}. It has {a + b + number} animals."


def make(folder: Path, rows: int) -> None:
    """Rows and a model as a user brings them."""
    from tpaw_core.config.params import Scratch
    from tpaw_core.engine import scratch

    for name, numbers in (("train", range(rows)), ("heldout", range(rows, rows + 100))):
        with (folder / f"{name}.jsonl").open("w") as file:
            for number in numbers:
                prompt, completion = text(number)
                file.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
    tokenizer = scratch.tokenizer((part for n in range(2000) for part in text(7 * n)), Scratch(**MODEL), 128)
    for place in ("model", *(f"checkpoints/{number}" for number in range(MEMBERS))):
        scratch.model(Scratch(**MODEL), tokenizer, max_length=128, seed=len(place)).save_pretrained(folder / place)
        tokenizer.save_pretrained(folder / place)


def data(context: Context) -> None:
    from tpaw_core.data import prepare

    shutil.rmtree(context.workspace.data, ignore_errors=True)
    prepare.prepare(context.workspace, context.params.data, context.params.seed)


def encode(context: Context) -> None:
    from tpaw_core.stages.encode import encode

    encode(context)


def synthetic(context: Context, iteration: int = 1) -> None:
    """The answers of one member."""
    from tpaw_core.artifacts import checkpoint
    from tpaw_core.artifacts.synthetic import write_synthetic
    from tpaw_core.data.endings import Response

    workspace, encoded, draw = context.workspace, context.encoded(), random.Random(iteration)
    tokenizer = checkpoint.load_tokenizer(workspace.tokenizer)
    answers = [Response([draw.randrange(5, 300) for _ in range(draw.randint(10, 30))], "stop") for _ in encoded.prompts]
    with workspace.publish(workspace.synthetic(iteration)) as aside:
        rows, digest = context.playing(), context.encoded_digest
        write_synthetic(aside, iteration, "0" * 64, rows, encoded, answers, tokenizer, digest)


def teams(context: Context) -> None:
    """Not measured: three members with answers, and the teams that they made."""
    from tpaw_core.artifacts import checkpoint
    from tpaw_core.artifacts.team import Member, Team, write_team
    from tpaw_core.workspace import files

    workspace = context.workspace
    for number in range(MEMBERS):
        folder = workspace.checkpoint(number)
        (folder / "number").write_text(str(number))
        checkpoint.seal(folder, number, checkpoint.Origin())
        if number:
            synthetic(context, number + 1)
    members = [
        Member(
            iteration=number,
            version=1,
            digest=checkpoint.manifest(workspace, number).digest,
            checkpoint=workspace.name(workspace.checkpoint(number)),
            synthetic=workspace.name(workspace.synthetic(number + 1)),
            synthetic_sha256=files.sha256(workspace.synthetic(number + 1)),
        )
        for number in range(MEMBERS)
    ]
    for t in range(1, MEMBERS + 1):
        write_team(workspace, Team(iteration=t, policy="latest", players=t, members=members[:t][::-1]))


def weights(context: Context) -> None:
    shutil.rmtree(context.workspace.scores, ignore_errors=True)
    known(context)


def known(context: Context) -> None:
    """The same weights with all scores in the store."""
    from tpaw_core.stages.weights import weights

    _score_by_a_formula()
    weights(context, MEMBERS)


def train(context: Context) -> None:
    from tpaw_core.engine.training import loop
    from tpaw_core.stages.train import train

    loop.self_play = lambda model, groups, *_, **__: [{"loss": float(len(groups))}]  # type: ignore[assignment]
    train(context, MEMBERS)


def _score_by_a_formula() -> None:
    """Scores by the number of tokens; how pairs are brought together stays as it is."""
    import torch

    from tpaw_core.engine import scoring

    class Pack(SimpleNamespace):
        def to(self, device: Any) -> Pack:
            return self

    @contextmanager
    def packer(model: Any, groups: Any, pad_id: int) -> Iterator[Callable[..., Pack]]:
        for _ in groups:
            pass
        model.forward = lambda pack: -0.5 * torch.tensor(pack.lengths)
        yield lambda groups: Pack(lengths=[len(response) for _, responses in groups for response in responses])

    scoring.packer = packer  # type: ignore[assignment]


STAGES = {
    "data": data,
    "encode": encode,
    "synthetic": synthetic,
    "teams": teams,
    "weights": weights,
    "weights, all known": known,
    "train": train,
}


def stage(arguments: argparse.Namespace) -> dict[str, float]:
    import pyarrow.parquet  # noqa: F401  what a stage imports is not its own
    import torch  # noqa: F401
    import transformers  # noqa: F401

    from tpaw_core.config import params_file
    from tpaw_core.engine import suitability  # noqa: F401
    from tpaw_core.engine.training import loop  # noqa: F401
    from tpaw_core.stages.context import Context
    from tpaw_core.workspace.paths import Workspace

    workspace = Workspace(Path(arguments.folder))
    own = ["model.model_name_or_path=model", "data.path=train.jsonl", "data.heldout_path=heldout.jsonl"]
    recipe = str(Path(__file__).parents[1] / "recipes" / "own.yaml")
    params, _ = params_file.resolve(workspace, recipe, [*own, "model.max_length=128"])
    before = ratio.peak_memory()
    started = time.process_time()
    STAGES[arguments.stage](Context(workspace, params))
    return {"seconds": time.process_time() - started, "memory": ratio.peak_memory() - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder")
    parser.add_argument("--stage", choices=list(STAGES), default="data")
    parser.add_argument("--rows", type=int, nargs="+", default=list(COUNTS))
    if not (arguments := ratio.run("bench.many_rows", {"stage": stage}, parser)):
        return
    figures: dict[str, dict[int, dict[str, float]]] = {}
    for rows in arguments.rows:
        with tempfile.TemporaryDirectory(prefix="tpaw-bench-") as folder:
            make(Path(folder), rows)
            for name in STAGES:
                runs = [
                    ratio.measure(arguments, "stage", stage=name, folder=folder, rows=rows)
                    for _ in range(1 if name == "teams" else arguments.repeats)
                ]
                own = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
                if name != "teams":
                    figures.setdefault(name, {})[rows] = own
                    line = f"{name}, {rows:,} rows: {own['seconds']:.1f} s, {own['memory']:.2f} GB"
                    print(f"{line}; a million take {own['seconds'] * 1e6 / rows:.0f} s", flush=True)
    least, most = min(arguments.rows), max(arguments.rows)
    growth = {name: own[most]["seconds"] / most / (own[least]["seconds"] / least) for name, own in figures.items()}
    print("time per row, most rows to fewest: " + ", ".join(f"{name} {value:.2f}" for name, value in growth.items()))
    ratio.write({"name": "many-rows", "figures": figures, "ratio": growth})


if __name__ == "__main__":
    main()
