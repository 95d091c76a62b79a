"""The readers of files and text that someone else may have written, as functions of a folder and bytes.

Each may raise TpawError and nothing else, and what it accepts must be correct. `chaos.fuzz` searches for inputs by
coverage; the tests draw some at random.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from tpaw_core.artifacts import adapters, checkpoint, score_store
from tpaw_core.artifacts.encoded import ROWS, read_encoded
from tpaw_core.artifacts.synthetic import read_responses
from tpaw_core.artifacts.team import read_team
from tpaw_core.artifacts.weights import read_weights
from tpaw_core.config import params_file
from tpaw_core.config.params import Data, Lora, Scratch
from tpaw_core.data import arithmetic, encoding, prepare
from tpaw_core.data.rows import read_rows
from tpaw_core.engine import scratch
from tpaw_core.errors import TpawError
from tpaw_core.workspace import files
from tpaw_core.workspace.paths import Workspace

ROOT = Path(__file__).parents[1]


def rows(folder: Path, content: bytes, kind: str) -> None:
    """A file of rows, as JSON lines, CSV or Parquet."""
    workspace, path, heldout = Workspace(folder), folder / f"rows.{kind}", folder / "heldout.jsonl"
    path.write_bytes(content)
    heldout.write_text('{"prompt": "held out", "completion": "yes"}\n')
    counts = prepare.prepare(workspace, Data(path=path.name, heldout_path=heldout.name, max_skipped=0.5), seed=0)
    assert counts["train"] == sum(1 for _ in read_rows(workspace.train_rows))


def params(folder: Path, content: bytes) -> None:
    """params.yaml."""
    path = Workspace(folder).params_file
    path.write_bytes(content)
    assert params_file.load(path).digest() == params_file.load(path).digest()


def override(folder: Path, content: bytes) -> None:
    """`tpaw use demo SECTION.KEY=VALUE`."""
    params_file.resolve(Workspace(ROOT), "demo", [content.decode(errors="ignore")])


def manifest(folder: Path, content: bytes) -> None:
    """A checkpoint's manifest.json, with the digest of its files corrected, as an attacker would."""
    workspace = Workspace(folder)
    own = workspace.checkpoint(1)
    own.mkdir(parents=True, exist_ok=True)
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        found = json.loads(content)
        content = json.dumps({**found, "digest": files.digest(found["files"])}).encode()
    (own / checkpoint.MANIFEST).write_bytes(content)
    assert all((own / name).is_file() for name in checkpoint.verify(workspace, 1).files)


def adapter(folder: Path, content: bytes) -> None:
    """adapter_config.json of an adapter made elsewhere."""
    (folder / adapters.CONFIG).write_bytes(content)
    (folder / adapters.WEIGHTS).touch()
    assert adapters.read_config(folder).r > 0
    with suppress(TpawError):
        adapters.require(folder, Lora())


def team(folder: Path, content: bytes) -> None:
    """teams/1.json."""
    workspace = Workspace(folder)
    workspace.team(1).parent.mkdir(exist_ok=True)
    workspace.team(1).write_bytes(content)
    for member in read_team(workspace, 1).members:
        for name in (member.checkpoint, member.synthetic):
            assert workspace.place(name).resolve().is_relative_to(folder.resolve())


def scores(folder: Path, content: bytes) -> None:
    """A file of the score store, named after its bytes, as an attacker would."""
    path = folder / f"{score_store.name(content)}.npy"
    path.write_bytes(content)
    try:
        score_store.read(path)
    finally:
        path.unlink()


def answers(folder: Path, content: bytes) -> None:
    """A Parquet file of synthetic data."""
    path = Workspace(folder).synthetic(1)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    read_responses(path, ["0" * 16])


def weights(folder: Path, content: bytes) -> None:
    """A Parquet file of weights."""
    path = Workspace(folder).weights(1)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    found = read_weights(path, 2)
    assert found.beta.shape == found.players_chosen.shape == (len(found.prompt_ids), 2)


def encoded(folder: Path, content: bytes) -> None:
    """A Parquet file of encoded rows: every row has a name, a place after the one before, and token ids."""
    path = Workspace(folder).encoded("train")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    found = read_encoded(Workspace(folder), "train")
    assert len(found.row_ids) == len(found.places) == len(found.prompts) == len(found.chosen)
    assert all(isinstance(row_id, str) for row_id in found.row_ids)
    assert all(earlier < later for earlier, later in pairwise([-1, *found.places]))
    assert all(min(ids, default=0) >= 0 for ids in [*found.prompts, *found.chosen])
    assert read_encoded(Workspace(folder), "train", 1).places == [place for place in found.places if place < 1]


@cache
def _tokenizer() -> Any:
    return scratch.tokenizer(PAIRS, Scratch(vocab_size=300), 128)


def text(folder: Path, content: bytes) -> None:
    """A row's text: the ids decode to the same text, and no turn begins or ends inside it."""
    workspace, tokenizer = Workspace(folder), _tokenizer()
    said = content.decode("utf-8", errors="surrogateescape" if len(content) % 2 else "ignore")
    item = {"prompt": said, "completion": said}
    (folder / "text.jsonl").write_text(json.dumps(item) + "\n")
    (folder / "heldout.jsonl").write_text('{"prompt": "held out", "completion": "yes"}\n')
    prepare.prepare(workspace, Data(path="text.jsonl", heldout_path="heldout.jsonl", max_skipped=0.0), seed=0)
    (row,) = read_rows(workspace.train_rows)
    ending = encoding.find_ending(tokenizer, [row], {}, [])
    found = encoding.encode([row], tokenizer, ending, max_length=100_000, max_skipped=0.0, name="text", options={})
    *ids, eos = found.chosen[0]
    assert eos == tokenizer.eos_token_id
    assert tokenizer.decode(ids) == row.completion
    assert not {*ids, *found.prompts[0]} & set(tokenizer.all_special_ids)


PAIRS = [json.dumps({"prompt": p, "completion": a}) for p, a in arithmetic.problems(3, seed=1)]
MANIFEST: dict[str, Any] = {
    "iteration": 1, "digest": "", "parent": None, "team": ["0"], "made_from": {"data/train.jsonl": "0"},
    "params": {"seed": 1}, "versions": {"torch": "2"}, "code": {"engine": "0"},
}  # fmt: skip
MEMBER = {
    "iteration": 0, "version": 1, "digest": "0", "checkpoint": "checkpoints/0", "synthetic": "synthetic/1.parquet",
    "synthetic_sha256": "0",
}  # fmt: skip
ADAPTER = {
    "peft_type": "LORA", "r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": ["q_proj"], "bias": "none",
    "base_model_name_or_path": "base", "rank_pattern": {}, "use_dora": False,
}  # fmt: skip
TEAM = {"iteration": 1, "policy": "latest", "players": 1, "members": [MEMBER]}
TARGETS: dict[str, tuple[Callable[..., None], list[bytes]]] = {
    "jsonl": (partial(rows, kind="jsonl"), ["\n".join(PAIRS).encode(), b'{"messages": [{"role": "user"}]}']),
    "csv": (partial(rows, kind="csv"), [b'prompt,completion\n"one, two",3\n']),
    "parquet": (partial(rows, kind="parquet"), []),
    "params": (params, [(ROOT / "params.yaml").read_bytes()]),
    "override": (override, [b"objective.eta=2", b"team.exclude=[1]", b"iterations.2.eta=3"]),
    "manifest": (manifest, [json.dumps(MANIFEST | {"files": sums}).encode() for sums in ({}, {"../x": "0"})]),
    "adapter": (adapter, [json.dumps(ADAPTER | changed).encode() for changed in ({}, {"r": "8"}, {"new": 1})]),
    "team": (team, [json.dumps(TEAM).encode(), json.dumps(TEAM | {"members": [{"iteration": 0}]}).encode()]),
    "scores": (scores, []),
    "answers": (answers, []),
    "weights": (weights, []),
    "encoded": (encoded, []),
    "text": (text, ["Größe «∑» 🦉 \u202eabc\x00<eos><pad>".encode(), "\ud800".encode(errors="surrogatepass")]),
}


def seeds(target: str) -> list[bytes]:
    """The first inputs: valid ones, and ones known to cause trouble."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    if target == "parquet":
        pq.write_table(pa.table({"prompt": ["a", "b"], "completion": ["1", "2"]}), sink)
    elif target == "answers":
        ids = pa.array([[1, 2]], pa.list_(pa.int32()))
        pq.write_table(pa.table({"prompt_id": ["0" * 16], "rejected_ids": ids}), sink)
    elif target == "weights":
        players = pa.array([[-1.0, -2.0]], pa.list_(pa.float64(), 2))
        numbers = dict.fromkeys(("players_chosen", "players_rejected", "beta"), players)
        pq.write_table(pa.table({"prompt_id": ["0" * 16], "opponent": ["1" * 64], **numbers}), sink)
    elif target == "encoded":
        ids = pa.array([[1, 2], [3]], pa.list_(pa.int32()))
        columns = {"prompt_id": ["0" * 16, "1" * 16], "place": [0, 2], "prompt_ids": ids, "target_ids": ids}
        pq.write_table(pa.table(columns).replace_schema_metadata({ROWS: ""}), sink)
    elif target == "scores":
        np.save(sink, np.zeros(2, score_store.ENTRY))
    return [*TARGETS[target][1], *([sink.getvalue().to_pybytes()] if sink.tell() else [])]
