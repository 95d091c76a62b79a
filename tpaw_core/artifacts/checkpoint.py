"""checkpoints/<t>: a folder that `from_pretrained` loads, with a manifest of SHA-256 sums; safetensors only.

Written, sealed, loaded and verified here and nowhere else.
"""

from __future__ import annotations

import contextlib
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field

from tpaw_core.artifacts import adapters, code, pretrained
from tpaw_core.artifacts.pretrained import Sharding
from tpaw_core.data import endings
from tpaw_core.errors import TpawError
from tpaw_core.workspace import files, records, sums
from tpaw_core.workspace.paths import Workspace
from tpaw_core.workspace.records import Record

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MANIFEST, GENERATION = "manifest.json", "generation_config.json"
PART = "5GB"  # the most that one file of weights holds: files are hashed side by side
VERSIONED = ("tpaw", "torch", "transformers", "tokenizers")
Sums = Callable[[Sequence[Path]], Sequence[str]]
SHIPPED = "_tpaw_shipped"  # the attribute that keeps a loaded model's own generation config


class Base(Record):
    """The whole model that an adapter belongs to."""

    source: str  # as the parameters name it, or a checkpoint of the workspace
    revision: str | None
    digest: str  # `base_digest`: wherever the base lies, this is what it is


class Manifest(Record):
    """manifest.json."""

    iteration: int
    digest: str  # of `files`, and of the base of an adapter: the checkpoint's identity
    base: Base | None = Field(default=None, exclude_if=lambda base: base is None)  # of an adapter
    parent: str | None  # digest of the checkpoint it was trained from
    team: list[str]  # digests of the members, newest first
    made_from: dict[str, str]  # what else was read -> its digest
    params: dict[str, Any]  # the parameters that decide its bytes
    versions: dict[str, str]  # of Python and the packages that decide its bytes
    code: dict[str, str] = Field(
        default_factory=dict
    )  # part -> digest of the code that decided its bytes; older manifests have none
    files: dict[str, str]  # name -> SHA-256


class Origin(NamedTuple):
    """Where a checkpoint comes from, as its manifest records it."""

    parent: str | None = None
    team: Sequence[str] = ()
    made_from: Mapping[str, str] = {}
    params: Mapping[str, Any] = {}
    base: Base | None = None


def write(
    workspace: Workspace,
    iteration: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    origin: Origin,
    *,
    dtype: str,
    stop_ids: Sequence[int],
) -> None:
    """The model in ``dtype`` (a name in torch), its tokenizer and the manifest; in place only when complete.

    Of a model with an adapter, the adapter alone, in float32. Then ``origin`` must name its base.
    generation_config.json is what the base model shipped, with ``stop_ids`` added: a serving stack reads it.
    """
    import torch

    with workspace.publish(workspace.checkpoint(iteration)) as aside:
        if adapters.active(model) is None:
            model.to(getattr(torch, dtype)).save_pretrained(aside, max_shard_size=PART)
        else:
            adapters.write(model, aside)
        tokenizer.save_pretrained(aside)
        shipped = getattr(model, SHIPPED, None) or model.generation_config.to_diff_dict()
        stops = endings.configured(model.config, SimpleNamespace(**shipped)) + list(stop_ids)
        stops = list(dict.fromkeys(stops))
        content = {**shipped, "eos_token_id": stops if len(stops) > 1 else stops[0]}
        (aside / GENERATION).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
        seal(aside, iteration, origin)
    workspace.pruned(iteration).unlink(missing_ok=True)


def seal(folder: Path, iteration: int, origin: Origin) -> Manifest:
    """Write the manifest of a finished checkpoint folder."""
    paths = [path for path in sorted(folder.iterdir()) if path.name != MANIFEST]
    shas = dict(zip([path.name for path in paths], sums.read(paths), strict=True))
    manifest = Manifest(
        iteration=iteration,
        digest=_identity(shas, origin.base),
        base=origin.base,
        parent=origin.parent,
        team=list(origin.team),
        made_from=dict(origin.made_from),
        params=dict(origin.params),
        versions=_versions(VERSIONED if origin.base is None else (*VERSIONED, "peft")),
        code=code.digests(),
        files=shas,
    )
    (folder / MANIFEST).write_text(manifest.text())
    return manifest


def _identity(shas: Mapping[str, str], base: Base | None) -> str:
    return files.digest(shas if base is None else {**shas, "base": base.digest})


def _versions(names: Sequence[str]) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(PackageNotFoundError):  # the code may run from a folder, uninstalled
            found[name] = version(name)
    return found


def manifest(workspace: Workspace, iteration: int) -> Manifest:
    """The manifest of checkpoint ``iteration``, its files not looked at; a pruned checkpoint has left its own behind.

    Raises TpawError where it is missing or damaged.
    """
    folder, pruned = workspace.checkpoint(iteration), workspace.pruned(iteration)
    return _read(pruned if not folder.exists() and pruned.exists() else folder / MANIFEST, folder)


def _read(path: Path, folder: Path, remedy: str | None = None) -> Manifest:
    files.need(path, remedy or f"make checkpoint {folder.name} first, or restore it with `dvc checkout`")
    remedy = remedy or f"restore it with `dvc checkout {folder}` or recreate it"
    found = records.read(path, Manifest, remedy)
    if _identity(found.files, found.base) != found.digest:
        raise TpawError(f"{path}: is damaged; {remedy}")
    return found


def verify(workspace: Workspace, iteration: int) -> Manifest:
    """The manifest, after checking that every file is there, unchanged, and none is a pickle.

    What the workspace remembers is not read again. The base of an adapter is not looked at. Raises TpawError naming the
    file.
    """
    found, folder = manifest(workspace, iteration), workspace.checkpoint(iteration)
    if not folder.exists():
        raise TpawError(f"{folder}: was pruned; recreate it with `dvc repro train@{iteration}`")
    remedy = f"move {folder} away, then restore it with `dvc checkout {folder}` or recreate the checkpoint"
    _verify_files(folder, found, remedy, workspace.sha256s)
    return found


def verify_folder(folder: Path, remedy: str, sha256s: Sums = sums.read) -> Manifest:
    """`verify` for a sealed folder that is no checkpoint of a workspace."""
    found = _read(folder / MANIFEST, folder, remedy)
    _verify_files(folder, found, remedy, sha256s)
    return found


def _verify_files(folder: Path, found: Manifest, remedy: str, sha256s: Sums) -> None:
    for path in folder.iterdir():
        if path.suffix in pretrained.PICKLE:
            raise TpawError(f"{path}: is a pickle file, which can run code when loaded; use safetensors")
        if path.name != MANIFEST and path.name not in found.files:
            raise TpawError(f"{path}: is not in the manifest; remove it, or {remedy}")
    paths = [folder / name for name in found.files]
    for name, path in zip(found.files, paths, strict=True):
        if Path(name).name != name:
            raise TpawError(f"{folder / MANIFEST}: {name!r} lies outside the checkpoint's folder")
        if not path.is_file():
            raise TpawError(f"{path}: is missing; {remedy}")
    for path, sha, found_sha in zip(paths, found.files.values(), sha256s(paths), strict=True):
        if found_sha != sha:
            raise TpawError(f"{path}: has changed since it was made; {remedy}")


def load_tokenizer(source: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Of a checkpoint, a folder or a hub id. Raises TpawError where it cannot be loaded."""
    return pretrained.load_tokenizer(source, revision)


def load_settings(source: str | Path, revision: str | None = None) -> tuple[Any, Any]:
    """The config and the generation config, None where the model ships none, without loading weights."""
    from transformers import GenerationConfig

    config = pretrained.load_config(source, revision)
    try:
        return config, GenerationConfig.from_pretrained(source, revision=revision or "main")
    except (OSError, ValueError):
        return config, None


def load_model(
    source: str | Path,
    *,
    dtype: str = "auto",
    revision: str | None = None,
    device: str | None = None,
    sharding: Sharding | None = None,
) -> PreTrainedModel:
    """The model in evaluation mode, by default on the accelerator if there is one.

    Raises TpawError where it cannot be loaded.
    """
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return _plain(pretrained.load_model(source, revision, dtype=dtype, device=device, sharding=sharding))


def load_empty(source: str | Path, revision: str | None = None) -> PreTrainedModel:
    """The same without memory for its weights: `fill` gives it some."""
    model, (_, shipped) = pretrained.load_empty(source, revision), load_settings(source, revision)
    if shipped is not None:
        model.generation_config = shipped
    return _plain(model)


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """What a model brings along (a repetition penalty, a minimal length) would sample from something other than pi."""
    from transformers import GenerationConfig

    setattr(model, SHIPPED, model.generation_config.to_diff_dict())
    stops = endings.configured(model.config, model.generation_config)
    model.generation_config = GenerationConfig(eos_token_id=stops or None)
    return model


def identity(workspace: Workspace, model: PreTrainedModel, source: str | Path) -> str:
    """Of a base model: the digest of a folder's weights, or the hub's commit."""
    folder = Path(source)
    if not folder.is_dir():
        return str(model.config._commit_hash)
    if (folder / MANIFEST).exists():
        return _read(folder / MANIFEST, folder).digest
    return _of_files(workspace, sorted(folder.glob("*.safetensors")))


def base_digest(workspace: Workspace, source: str | Path, revision: str | None = None) -> str:
    """What a whole model is, wherever it lies: of a folder its config and weights; of a hub id the commit.

    Raises TpawError where it is missing, damaged, or not a whole model.
    """
    folder = Path(source)
    if not folder.is_dir():
        return str(pretrained.load_config(source, revision)._commit_hash)
    if (folder / MANIFEST).exists():
        return verify_folder(folder, "restore it, or copy it again", workspace.sha256s).digest
    config = files.need(folder / "config.json", "use a folder that holds a whole model")
    return _of_files(workspace, [config, *sorted(folder.glob("*.safetensors"))])


def _of_files(workspace: Workspace, paths: Sequence[Path]) -> str:
    return files.digest(dict(zip([path.name for path in paths], workspace.sha256s(paths), strict=True)))
