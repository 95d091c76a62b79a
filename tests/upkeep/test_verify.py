"""What `tpaw verify` finds, what `tpaw prune` leaves, and how a lineage is told; on a workspace made by `dvc repro`."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chaos.workspace import Workspace
from mlflow import MlflowClient
from tpaw_core.config import params_file
from tpaw_core.tracking.registry import MODEL, Registry
from tpaw_core.upkeep import verify


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """SFT and four iterations."""
    workspace = Workspace.make(tmp_path_factory.mktemp("integrity"), "sft.num_train_epochs=2", iterations=4)
    workspace.preload()
    workspace.run("dvc", "repro")
    yield workspace
    workspace.close()


@pytest.fixture
def here(made: Workspace, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.chdir(made.folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return made


@contextmanager
def changed(path: Path, content: bytes) -> Iterator[None]:
    """A file with other bytes for a while; what DVC's cache has of it stays as it was."""
    before = path.read_bytes()
    assert content != before
    path.unlink()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def flipped(path: Path) -> bytes:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    return bytes(content)


def retold(path: Path, change: Callable[[dict], None]) -> bytes:
    found = json.loads(path.read_text())
    change(found)
    return json.dumps(found, indent=2).encode()


def rewritten(path: Path, name: str, change: Callable[[object], object]) -> bytes:
    table = pq.read_table(path)
    place = table.schema.get_field_index(name)
    values = [change(value) for value in table[name].to_pylist()]
    sink = pa.BufferOutputStream()
    pq.write_table(table.set_column(place, name, pa.array(values, table.schema.field(name).type)), sink)
    return sink.getvalue().to_pybytes()


def one(pattern: str) -> Path:
    return sorted(Path().glob(pattern))[0]


def in_the_cache() -> Path:
    return next(path for path in sorted(Path(".dvc/cache/files/md5").glob("??/*")) if path.stat().st_size > 10000)


CORRUPTIONS: dict[str, tuple[Callable[[], Path], Callable[[Path], bytes]]] = {
    "a weight's bit": (lambda: Path("checkpoints/1/model.safetensors"), flipped),
    "a parent's name": (
        lambda: Path("checkpoints/2/manifest.json"),
        lambda path: retold(path, lambda found: found.update(parent="0" * 64)),
    ),
    "a training row": (lambda: Path("data/train.jsonl"), flipped),
    "a target in synthetic data": (
        lambda: Path("synthetic/1.parquet"),
        lambda path: rewritten(path, "chosen", lambda text: f"{text}!"),
    ),
    "whose answers": (
        lambda: Path("synthetic/2.parquet"),
        lambda path: rewritten(path, "opponent", lambda digest: "0" * 64),
    ),
    "a member of a team": (
        lambda: Path("teams/3.json"),
        lambda path: retold(path, lambda found: found["members"][1].update(digest="0" * 64)),
    ),
    "a player's weight": (
        lambda: Path("weights/2.parquet"),
        lambda path: rewritten(path, "beta", lambda beta: [2 * value for value in beta]),
    ),
    "a log-probability": (
        lambda: Path("weights/3.parquet"),
        lambda path: rewritten(path, "players_chosen", lambda logps: [float("nan")] * len(logps)),
    ),
    "a score": (lambda: one(".tpaw/scores/*/*/*/*.npy"), flipped),
    "a number in a log": (
        lambda: Path("training/1.jsonl"),
        lambda path: path.read_bytes().replace(b'"loss": ', b'"loss": NaN, "old": ', 1),
    ),
    "what was measured": (
        lambda: Path("metrics/2.json"),
        lambda path: retold(path, lambda found: found.update(checkpoint="0" * 64)),
    ),
    "a sum in dvc.lock": (
        lambda: Path("dvc.lock"),
        lambda path: path.read_bytes().replace(b"path: samples/0.jsonl\n      hash: md5\n      md5: ", b"&f", 1),
    ),
    "an object in the cache": (in_the_cache, flipped),
    "a file in MLflow": (lambda: one(".tpaw/mlflow/artifacts/*/artifacts/model/model.safetensors"), flipped),
}


@pytest.mark.parametrize("what", list(CORRUPTIONS))
def test_a_planted_corruption_is_found_and_named(here: Workspace, what: str) -> None:
    place, corrupt = CORRUPTIONS[what]
    path = place()
    with changed(path, corrupt(path)):
        said = verify.check(Registry(params_file.load())).disagreements
    assert said
    name = "version " if ".tpaw/mlflow" in str(path) else str(path).removesuffix("/manifest.json")
    assert any(name in line for line in said), said


def test_a_healthy_workspace_has_nothing_that_disagrees(here: Workspace) -> None:
    said = here.run("tpaw", "verify").stdout
    assert "nothing disagrees" in said
    assert "checked: 1 data sets, 5 checkpoints, 4 synthetic data sets, 4 teams, 4 weights" in said
    assert "5 versions in the registry" in said
    with changed(Path("metrics/0.json"), b"{}"):
        done = here.run("tpaw", "verify", check=False)
    assert done.returncode == 1
    assert "metrics/0.json" in done.stdout
    assert "error: " in done.stderr


@pytest.mark.parametrize("content", [b"", b"stages: {"])
def test_what_a_full_disk_leaves_of_dvc_lock_may_be_deleted(here: Workspace, content: bytes) -> None:
    with changed(Path("dvc.lock"), content):
        (said,) = verify.check(None).disagreements
    assert re.fullmatch(r"dvc\.lock: cannot be read \(.*\); delete it, and `dvc repro` takes what has run .*", said)


def test_a_version_of_another_parent_and_a_second_one_are_found(here: Workspace) -> None:
    client = here.client()
    (version,) = [v for v in client.search_model_versions(f"name='{MODEL}'") if v.tags["iteration"] == "1"]
    client.set_model_version_tag(MODEL, version.version, "parent", "0" * 64)
    try:
        said = verify.check(Registry(params_file.load())).disagreements
    finally:
        client.set_model_version_tag(MODEL, version.version, "parent", version.tags["parent"])
    assert len(said) == 1
    assert "other tags than its manifest" in said[0]
    second = client.create_model_version(MODEL, version.source, version.run_id, tags=version.tags)
    try:
        said = verify.check(Registry(params_file.load())).disagreements
    finally:
        client.delete_model_version(MODEL, second.version)
    assert len(said) == 1
    assert "registered 2 times" in said[0]


def test_a_lineage_leads_back_to_the_base_model(here: Workspace) -> None:
    said = here.run("tpaw", "lineage", "-t", "4").stdout
    lines = [line.split() for line in said.splitlines() if line.startswith("checkpoint ")]
    assert [(line[1], line[2]) for line in lines] == [(str(t), here.digest(t)) for t in (4, 3, 2, 1, 0)]
    against = ", ".join(here.digest(t)[:12] for t in (3, 2, 1))
    assert f"against: {against}" in said
    assert "objective.eta=6.0" in said
    assert "seed=42" in said
    assert "torch 2." in said
    assert said.count("read data/train.jsonl: ") == 5
    with changed(Path("checkpoints/2/manifest.json"), retold(Path("checkpoints/2/manifest.json"), moved)):
        done = here.run("tpaw", "lineage", "-t", "4", check=False)
    assert done.returncode == 1
    assert "checkpoints/1: is not what checkpoints/2 was trained from" in done.stderr


def moved(found: dict) -> None:
    found["parent"] = "0" * 64


def versions(client: MlflowClient) -> set[str]:
    return {v.tags["iteration"] for v in client.search_model_versions(f"name='{MODEL}'")}


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_prune_says_first_and_keeps_what_a_team_an_alias_or_a_lineage_needs(here: Workspace) -> None:
    client = here.client()
    champion = client.get_model_version_by_alias(MODEL, "champion").tags["iteration"]
    kept = {"0", "2", "3", "4", champion}
    before = {name: size(Path(name)) for name in (".dvc/cache", ".tpaw/mlflow/artifacts", ".tpaw/scores")}
    said = here.run("tpaw", "prune").stdout
    assert "tpaw prune --yes" in said
    assert versions(client) == {"0", "1", "2", "3", "4"}
    if champion == "1":
        assert "nothing can go" in said
        client.set_registered_model_alias(MODEL, "champion", "1")
        kept = {"0", "2", "3", "4"}
    assert "checkpoints/1" in here.run("tpaw", "prune").stdout
    (left := Path("checkpoints/.7-going")).mkdir()  # by a prune that was killed
    here.run("tpaw", "prune", "--yes")
    assert not left.exists()
    assert {path.name for path in Path("checkpoints").iterdir()} == kept
    assert versions(client) == kept
    for name, bytes_before in before.items():
        assert size(Path(name)) < bytes_before, name
    assert "nothing can go" in here.run("tpaw", "prune").stdout
    assert "nothing disagrees" in here.run("tpaw", "verify").stdout
    assert here.run("tpaw", "lineage", "-t", "4").stdout.count("checkpoint ") >= 5
    # What is left goes on: the fifth iteration has its team, and nothing that was pruned is made again.
    here.run("tpaw", "use", "iterations.5.previous=4")
    said = here.run("dvc", "repro", "--allow-missing", "train@5").stdout
    assert "Running stage 'train@5'" in said
    assert "Running stage 'train@1'" not in said
    assert here.team(5) == [4, 3, 2]


def test_a_pruned_checkpoint_is_refused_with_the_way_to_get_it_back(here: Workspace) -> None:
    assert not Path("checkpoints/1").exists()
    done = here.run("tpaw", "generate", "-t", "2", check=False)
    assert done.returncode == 1
    assert "checkpoints/1" in done.stderr
    digest = json.loads(Path(".tpaw/pruned/1.json").read_text())["digest"]
    shutil.rmtree(".tpaw/scores")
    here.run("dvc", "repro", "train@1")
    assert here.digest(1) == digest
    assert not Path(".tpaw/pruned/1.json").exists()
