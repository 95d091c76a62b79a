"""What `tpaw verify` finds; each test has a copy of one workspace that `dvc repro` made."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.workspace import Project
from tpaw_core.artifacts import checkpoint, code
from tpaw_core.config import params_file
from tpaw_core.stages.context import Context, open_context
from tpaw_core.tracking.registry import MODEL
from tpaw_core.upkeep import verify
from tpaw_core.upkeep.verify import Findings
from tpaw_core.workspace import files, records, sums

pytestmark = pytest.mark.slow


def check(project: Project) -> Findings:
    return verify.check(open_context(project.workspace, params_file.load(project.workspace.params_file)))


def write(path: Path, content: bytes) -> None:
    """Other bytes; what DVC's cache has of the file stays as it was."""
    assert content != path.read_bytes()
    path.unlink()
    path.write_bytes(content)


def flipped(path: Path) -> bytes:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    return bytes(content)


def changed(path: Path, change: Callable[[dict], None]) -> bytes:
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


CACHE = ".dvc/cache/files/md5/??/*"
CORRUPTIONS: dict[str, tuple[str, Callable[[Path], bytes]]] = {
    "a weight's bit": ("checkpoints/1/model.safetensors", flipped),
    "a parent's name": (
        "checkpoints/2/manifest.json",
        lambda path: changed(path, lambda found: found.update(parent="0" * 64)),
    ),
    "a training row": ("data/train.jsonl", flipped),
    "a bit of encoded rows": ("encoded/train.parquet", flipped),
    "an id of encoded rows": (
        "encoded/train.parquet",
        lambda path: rewritten(path, "target_ids", lambda ids: [ids[0] + 1, *ids[1:]]),
    ),
    "a row's place": ("encoded/train.parquet", lambda path: rewritten(path, "place", lambda place: place + 1)),
    "where a text ends": (
        "encoded/tokenizer/ending.json",
        lambda path: changed(path, lambda found: found.update(stop_ids=[])),
    ),
    "a target in synthetic data": (
        "synthetic/1.parquet",
        lambda path: rewritten(path, "chosen", lambda text: f"{text}!"),
    ),
    "whose answers": ("synthetic/2.parquet", lambda path: rewritten(path, "opponent", lambda digest: "0" * 64)),
    "a member of a team": (
        "teams/3.json",
        lambda path: changed(path, lambda found: found["members"][1].update(digest="0" * 64)),
    ),
    "a player's weight": (
        "weights/2.parquet",
        lambda path: rewritten(path, "beta", lambda beta: [2 * value for value in beta]),
    ),
    "a log-probability": (
        "weights/3.parquet",
        lambda path: rewritten(path, "players_chosen", lambda logps: [float("nan")] * len(logps)),
    ),
    "a score": (".tpaw/scores/*/*/*/*.npy", flipped),
    "a number in a log": (
        "training/1.jsonl",
        lambda path: path.read_bytes().replace(b'"loss": ', b'"loss": NaN, "old": ', 1),
    ),
    "what was measured": (
        "metrics/2.json",
        lambda path: changed(path, lambda found: found.update(checkpoint="0" * 64)),
    ),
    "a sum in dvc.lock": (
        "dvc.lock",
        lambda path: path.read_bytes().replace(b"path: samples/0.jsonl\n      hash: md5\n      md5: ", b"&f", 1),
    ),
    "an object in the cache": (CACHE, flipped),
    "a file in MLflow": (".tpaw/mlflow/artifacts/*/artifacts/model/model.safetensors", flipped),
}


@pytest.mark.parametrize("what", list(CORRUPTIONS))
def test_a_planted_corruption_is_found_and_named(longer_project: Project, what: str) -> None:
    pattern, corrupt = CORRUPTIONS[what]
    path = next(
        path for path in sorted(longer_project.folder.glob(pattern)) if pattern != CACHE or path.stat().st_size > 10000
    )
    write(path, corrupt(path))
    said = check(longer_project).disagreements
    assert said
    name = "version " if ".tpaw/mlflow" in str(path) else str(path).removesuffix("/manifest.json")
    assert any(name in line for line in said), said


def test_what_stages_remember_is_read_all_the_same(longer_project: Project) -> None:
    """Bytes that changed on the disk by themselves: no time tells of them."""
    workspace = longer_project.workspace
    path = workspace.checkpoint(1) / "model.safetensors"
    time.sleep(sums.SETTLED / 1e9 + 0.1)
    checkpoint.verify(workspace, 1)
    write(path, flipped(path))
    memory = records.read(workspace.sums, sums.Memory)
    now = path.stat()
    stamp = [now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns]
    known = {**memory.known, str(path): memory.known[str(path)].model_copy(update={"stamp": stamp})}
    digest = files.digest({name: value.model_dump() for name, value in known.items()})
    workspace.sums.write_text(sums.Memory(digest=digest, known=known).text())
    checkpoint.verify(workspace, 1)
    assert f"{path}: has changed since it was made" in "".join(check(longer_project).disagreements)


def test_a_healthy_workspace_has_nothing_that_disagrees(longer_project: Project) -> None:
    done = longer_project.run("tpaw", "verify")
    assert done.stdout.endswith("no problems found\n")
    assert "note: " not in done.stdout
    assert (
        "checked: datasets 1, encoded files 4, checkpoints 5, synthetic datasets 4, teams 4, weights 4" in done.stdout
    )
    assert "versions in the registry 5" in done.stdout


@pytest.mark.parametrize(
    ("corrupt", "reason"),
    [
        (
            lambda path: path.read_bytes()[:-9],
            r"cannot be read \(.*\); recreate it, or restore it with `dvc checkout`",
        ),
        (
            lambda path: rewritten(path, "prompt_id", lambda prompt_id: prompt_id[::-1]),
            r"its rows do not match .*/data/train\.jsonl; recreate it with `tpaw encode`",
        ),
        (
            lambda path: path.with_name("heldout.parquet").read_bytes(),
            r"was not made from the current data/train\.jsonl; recreate it with `tpaw encode`",
        ),
    ],
)
def test_encoded_rows_are_checked_without_dvc_too(
    longer_project: Project, corrupt: Callable[[Path], bytes], reason: str
) -> None:
    """One line on the file itself; another one on what was made from it."""
    path = longer_project.workspace.encoded("train")
    write(path, corrupt(path))
    shutil.rmtree(longer_project.folder / ".dvc")
    said = check(longer_project).disagreements
    assert len([line for line in said if re.fullmatch(f"{re.escape(str(path))}: {reason}", line)]) == 1, said
    assert (
        f"{longer_project.workspace.checkpoint(0)}: was made from a different version of {path}; run `dvc repro`"
        in said
    )


def test_a_disagreement_is_printed_and_the_status_is_1(longer_project: Project) -> None:
    write(longer_project.workspace.metrics(0), b"{}")
    done = longer_project.run("tpaw", "verify", check=False)
    assert done.returncode == 1
    assert "metrics/0.json" in done.stdout
    assert "error: problems: 2, listed above" in done.stderr


def test_a_checkpoint_of_other_code_is_a_note_and_not_a_disagreement(longer_project: Project) -> None:
    manifest = longer_project.workspace.checkpoint(2) / checkpoint.MANIFEST
    write(manifest, changed(manifest, lambda found: found["code"].update(engine="0" * 64)))
    shutil.rmtree(longer_project.folder / ".dvc")  # DVC has its own memory of the bytes
    found = check(longer_project)
    assert found.disagreements == []
    (note,) = found.notes
    assert note == (
        f"{manifest.parent}: was made by a different version of the code (engine); "
        "`dvc repro --force --single-item train@2` reruns it"
    )


def test_notes_alone_leave_the_status_at_0(longer_project: Project) -> None:
    """As after an upgrade: DVC knows the manifest as it is."""
    manifest = longer_project.workspace.checkpoint(0) / checkpoint.MANIFEST
    write(manifest, changed(manifest, lambda found: found["code"].update(method="0" * 64, encoding="1" * 64)))
    longer_project.run("dvc", "commit", "--force", "--quiet", "sft")
    done = longer_project.run("tpaw", "verify")
    assert done.stdout.splitlines()[0] == (
        "note: checkpoints/0: was made by a different version of the code (method, encoding); "
        "`dvc repro --force --single-item sft` reruns it"
    )
    assert done.stdout.endswith("no problems found\n")


def test_a_manifest_without_code_is_of_an_earlier_version_and_no_note(longer_project: Project) -> None:
    manifest = longer_project.workspace.checkpoint(1) / checkpoint.MANIFEST
    assert checkpoint.manifest(longer_project.workspace, 1).code == code.digests()
    write(manifest, changed(manifest, lambda found: found.pop("code")))
    assert check(longer_project).notes == []


@pytest.mark.parametrize("content", [b"", b"stages: {"])
def test_what_a_full_disk_leaves_of_dvc_lock_may_be_deleted(longer_project: Project, content: bytes) -> None:
    lock = longer_project.folder / "dvc.lock"
    write(lock, content)
    params = params_file.load(longer_project.workspace.params_file)
    (said,) = verify.check(Context(longer_project.workspace, params)).disagreements
    assert re.fullmatch(
        rf"{re.escape(str(lock))}: cannot be read \(.*\); delete it, and `dvc repro` restores finished stages .*", said
    )


def test_a_version_of_another_parent_is_found(longer_project: Project) -> None:
    client = longer_project.client()
    (version,) = [v for v in client.search_model_versions(f"name='{MODEL}'") if v.tags["iteration"] == "1"]
    client.set_model_version_tag(MODEL, version.version, "parent", "0" * 64)
    said = check(longer_project).disagreements
    assert len(said) == 1
    assert "tags that do not match the checkpoint's manifest" in said[0]


def test_a_second_version_of_a_checkpoint_is_found(longer_project: Project) -> None:
    client = longer_project.client()
    (version,) = [v for v in client.search_model_versions(f"name='{MODEL}'") if v.tags["iteration"] == "1"]
    client.create_model_version(MODEL, version.source, version.run_id, tags=version.tags)
    said = check(longer_project).disagreements
    assert len(said) == 1
    assert "registered 2 times" in said[0]
