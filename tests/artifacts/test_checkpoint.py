from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.rows import eos_ending
from tpaw_core.artifacts import checkpoint, code
from tpaw_core.config.params import Generation
from tpaw_core.engine.generation import in_process
from tpaw_core.errors import TpawError
from tpaw_core.workspace import files
from tpaw_core.workspace.paths import Workspace

Break = Callable[[Path], Any]
STOPS = (5, 1)  # 1: EOS, which the model names too


@pytest.fixture
def folder(model: Any, save_checkpoint: Callable[..., Any], workspace: Workspace) -> Path:
    """Checkpoint 1 of the workspace."""
    save_checkpoint(model, workspace.checkpoint(1), iteration=1, parent="f" * 64)
    return workspace.checkpoint(1)


def test_a_sound_checkpoint_is_verified_and_loads_what_was_saved(
    folder: Path, workspace: Workspace, model: Any, tokenizer: Any
) -> None:
    found = checkpoint.verify(workspace, 1)
    assert (found.iteration, found.parent, found.team) == (1, "f" * 64, [])
    assert set(found.files) == {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert "model.safetensors" in found.files
    loaded = checkpoint.load_model(folder, dtype="float32")
    assert not loaded.training
    for ours, theirs in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    text = "Ada has 12 apples.\n"
    assert checkpoint.load_tokenizer(folder)(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert checkpoint.load_tokenizer(folder).chat_template == tokenizer.chat_template


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (
            lambda folder: (folder / "model.safetensors").unlink(),
            r"model\.safetensors: is missing; move .* away, then restore",
        ),
        (
            lambda folder: flip_a_byte(folder / "model.safetensors"),
            r"model\.safetensors: has changed since it was made",
        ),
        (lambda folder: (folder / "config.json").open("a").write("\n"), r"config\.json: has changed"),
        (lambda folder: (folder / "tokenizer.json").unlink(), r"tokenizer\.json: is missing"),
        (lambda folder: (folder / "extra.safetensors").write_bytes(b""), r"extra\.safetensors: is not in the manifest"),
        (lambda folder: (folder / "modeling_x.py").write_text(""), r"modeling_x\.py: is not in the manifest"),
        (lambda folder: (folder / "deep").mkdir(), r"deep: is not in the manifest"),
        (lambda folder: (folder / "pytorch_model.bin").write_bytes(b""), r"pytorch_model\.bin: is a pickle file"),
        (lambda folder: (folder / "a.PT").write_bytes(b""), r"a\.PT: is (a pickle file|not in the manifest)"),
        (
            lambda folder: (folder / "manifest.json").unlink(),
            r"manifest\.json: does not exist; make checkpoint 1 first",
        ),
    ],
)
def test_what_was_done_to_a_checkpoint_is_found_and_named(
    harm: Break, message: str, folder: Path, workspace: Workspace
) -> None:
    harm(folder)
    with pytest.raises(TpawError, match=message):
        checkpoint.verify(workspace, 1)


def test_a_pickle_is_refused_even_if_the_manifest_lists_it(folder: Path, workspace: Workspace) -> None:
    (folder / "optimizer.pt").write_bytes(b"x")
    checkpoint.seal(folder, 1, checkpoint.Origin())
    with pytest.raises(TpawError, match=r"optimizer\.pt: is a pickle file"):
        checkpoint.verify(workspace, 1)


def without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda found: {k: v for k, v in found.items() if k != key}


@pytest.mark.parametrize(
    "damage",
    [
        *(without(key) for key in ("iteration", "digest", "parent", "params", "files")),
        lambda found: {**found, "extra": 1},
        lambda found: {**found, "digest": "0" * 64},
        lambda found: {**found, "files": {**found["files"], "config.json": "0" * 64}},
        lambda found: {**found, "files": None},
        lambda found: {**found, "files": ["config.json"]},
        lambda found: {**found, "code": {"engine": 1}},
        lambda found: [found],
        lambda found: None,
    ],
)
def test_a_damaged_manifest_is_refused(damage: Callable[[Any], Any], folder: Path, workspace: Workspace) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(TpawError, match=r"manifest\.json: is damaged; restore it with `dvc checkout"):
        checkpoint.manifest(workspace, 1)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 5000])
def test_a_manifest_that_is_not_json_is_refused(content: bytes, folder: Path, workspace: Workspace) -> None:
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(TpawError, match=r"manifest\.json: is damaged"):
        checkpoint.verify(workspace, 1)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "deep/file"])
def test_a_name_outside_the_folder_is_refused(name: str, folder: Path, workspace: Workspace) -> None:
    path = folder / "manifest.json"
    found = json.loads(path.read_text())
    found["files"][name] = "0" * 64
    path.write_text(json.dumps({**found, "digest": files.digest(found["files"])}))
    with pytest.raises(TpawError, match="lies outside the checkpoint's folder"):
        checkpoint.verify(workspace, 1)


def test_the_digest_depends_on_bytes_and_on_nothing_else(
    make_model: Callable[[int], Any],
    save_checkpoint: Callable[..., Any],
    folder: Path,
    workspace: Workspace,
    tmp_path: Path,
) -> None:
    first = checkpoint.verify(workspace, 1).digest
    copy = tmp_path / "elsewhere" / "2"
    shutil.copytree(folder, copy)
    for path in copy.iterdir():
        os.utime(path, (0, 0))
        path.chmod(0o600)
    assert checkpoint.seal(copy, 2, checkpoint.Origin(params={"seed": 2})).digest == first
    assert save_checkpoint(make_model(0), tmp_path / "same", iteration=7).digest == first
    assert save_checkpoint(make_model(1), tmp_path / "other").digest != first


def test_a_folder_with_only_a_pickle_is_not_loaded(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    model.config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(TpawError, match=r"pytorch_model\.bin: is a pickle file, which can run code"):
        checkpoint.load_model(tmp_path)


@pytest.mark.parametrize("load", [checkpoint.load_model, checkpoint.load_tokenizer])
def test_a_hub_name_while_offline_is_refused_and_says_why(
    load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(TpawError, match=r"model 'nobody/nothing': cannot be loaded\. HF_HUB_OFFLINE is set: unset it"):
        load("nobody/nothing")


@pytest.mark.parametrize("content", [b"", b"\x08\x00\x00\x00\x00\x00\x00\x00{broken", None])
def test_a_model_file_that_cannot_be_read_is_refused(content: bytes | None, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(TpawError, match=f"model '{folder}': cannot be loaded"):
        checkpoint.load_model(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_is_written_in_the_dtype_that_was_asked_for(
    dtype: str, make_model: Callable[[int], Any], tokenizer: Any, workspace: Workspace
) -> None:
    origin = checkpoint.Origin("a" * 64, ["b" * 64], {"data/train.jsonl": "c" * 64}, {"seed": 1})
    workspace.pruned(2).parent.mkdir(parents=True)
    workspace.pruned(2).write_text("of the checkpoint that was here before")
    checkpoint.write(workspace, 2, make_model(0), tokenizer, origin, dtype=dtype, stop_ids=STOPS)
    found = checkpoint.verify(workspace, 2)
    assert checkpoint.Origin(found.parent, found.team, found.made_from, found.params) == origin
    assert found.code == code.digests()
    assert checkpoint.load_model(workspace.checkpoint(2)).dtype == getattr(torch, dtype)
    assert not workspace.pruned(2).exists()


def test_a_pruned_checkpoint_has_its_manifest_and_says_how_to_make_it_again(folder: Path, workspace: Workspace) -> None:
    expected = checkpoint.manifest(workspace, 1)
    workspace.pruned(1).parent.mkdir(parents=True)
    (folder / "manifest.json").rename(workspace.pruned(1))
    shutil.rmtree(folder)
    assert checkpoint.manifest(workspace, 1) == expected
    with pytest.raises(TpawError, match=rf"{folder}: was pruned; recreate it with `dvc repro train@1`"):
        checkpoint.verify(workspace, 1)


def test_a_manifest_from_before_code_was_recorded_is_accepted_and_reports_nothing(
    folder: Path, workspace: Workspace
) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(without("code")(json.loads(path.read_text()))))
    found = checkpoint.verify(workspace, 1)
    assert found.code == {}
    assert code.changed(found.code) == []


def test_a_base_model_is_known_by_its_weights_or_its_manifest(
    model: Any, save_checkpoint: Callable[..., Any], workspace: Workspace, tmp_path: Path
) -> None:
    sealed = save_checkpoint(model, tmp_path / "sealed")
    assert checkpoint.identity(workspace, model, tmp_path / "sealed") == sealed.digest
    model.save_pretrained(tmp_path / "plain")
    weights = {"model.safetensors": files.sha256(tmp_path / "plain" / "model.safetensors")}
    assert checkpoint.identity(workspace, model, tmp_path / "plain") == files.digest(weights)


def test_generation_settings_that_came_with_a_model_are_not_loaded(folder: Path) -> None:
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "repetition_penalty": 5.0, "do_sample": True, "top_k": 3}))
    loaded = checkpoint.load_model(folder)
    assert loaded.generation_config.repetition_penalty in (None, 1.0)
    assert loaded.generation_config.top_k in (None, 50)
    assert loaded.generation_config.eos_token_id == [loaded.config.eos_token_id]


SHIPPED = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.1}


@pytest.fixture
def base(model: Any, tokenizer: Any, workspace: Workspace) -> Path:
    """A released model: settings to chat with it, two stop tokens."""
    folder = workspace.root / "base"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({**SHIPPED, "eos_token_id": [7, 8]}))
    return folder


def stored(workspace: Workspace, iteration: int) -> dict[str, Any]:
    return json.loads((workspace.checkpoint(iteration) / "generation_config.json").read_text())


def test_a_checkpoint_keeps_the_settings_that_its_base_shipped_and_names_every_stop_token(
    base: Path, tokenizer: Any, workspace: Workspace
) -> None:
    """What serves the checkpoint reads them; each checkpoint hands them on to the next."""
    source = base
    for iteration in (0, 1):
        loaded = checkpoint.load_model(source, device="cpu")
        origin = checkpoint.Origin()
        checkpoint.write(workspace, iteration, loaded, tokenizer, origin, dtype="float32", stop_ids=STOPS)
        found = stored(workspace, iteration)
        assert {name: found[name] for name in SHIPPED} == SHIPPED
        assert found["eos_token_id"] == [loaded.config.eos_token_id, 7, 8, 5]
        source = workspace.checkpoint(iteration)
    assert stored(workspace, 0) == stored(workspace, 1)
    assert checkpoint.verify(workspace, 1).files.keys() >= {"generation_config.json"}


def test_what_a_base_ships_does_not_bend_the_distribution_that_is_sampled(
    base: Path, model: Any, tokenizer: Any
) -> None:
    loaded = checkpoint.load_model(base, device="cpu")
    own = loaded.generation_config
    assert own.do_sample in (None, False)
    assert own.temperature in (None, 1.0)
    assert own.top_p in (None, 1.0)
    assert own.top_k in (None, 50)
    assert own.repetition_penalty in (None, 1.0)
    prompts, settings = [[5, 6, 7], [8, 9]], Generation(temperature=1.0, max_new_tokens=12)

    def answers(of: Any) -> Any:
        ending, pad = eos_ending(tokenizer), tokenizer.pad_token_id
        return in_process.generate(of, prompts, settings, max_length=64, ending=ending, pad_id=pad, seed=1)

    assert answers(loaded) == answers(model)


def test_a_new_model_s_checkpoint_names_its_stop_tokens(model: Any, tokenizer: Any, workspace: Workspace) -> None:
    eos = tokenizer.eos_token_id
    checkpoint.write(workspace, 0, model, tokenizer, checkpoint.Origin(), dtype="float32", stop_ids=(eos,))
    assert stored(workspace, 0)["eos_token_id"] == eos
