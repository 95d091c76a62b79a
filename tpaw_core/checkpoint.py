"""A checkpoint: the folder that `from_pretrained` loads, with a manifest of SHA-256 sums; safetensors only.

Knows files and digests; must not know the registry or the stages.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from tpaw_core import config, workspace
from tpaw_core.errors import TpawError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MANIFEST = "manifest.json"
PICKLE = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}


class Manifest(TypedDict):
    """What manifest.json holds."""

    iteration: int
    digest: str  # of `files`: the checkpoint's identity
    parent: str | None  # digest of the checkpoint it was trained from
    params: str  # digest of those parameters that decide its bytes
    files: dict[str, str]  # name -> SHA-256


def seal(folder: Path, *, iteration: int, parent: str | None, params: str) -> Manifest:
    """Write the manifest of a finished checkpoint folder."""
    files = {path.name: workspace.sha256(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}
    manifest = Manifest(iteration=iteration, digest=config.digest(files), parent=parent, params=params, files=files)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def manifest(folder: Path) -> Manifest:
    """Read and check the manifest's form, not the files.

    Raises TpawError where it is missing or malformed.
    """
    path = workspace.need(folder / MANIFEST, f"make checkpoint {folder.name} first, or restore it with `dvc checkout`")
    try:
        found: Manifest = json.loads(path.read_text(encoding="utf-8"))
        good = set(found) == set(Manifest.__annotations__) and config.digest(found["files"]) == found["digest"]
    except (ValueError, TypeError, KeyError):
        good = False
    if not good:
        raise TpawError(f"{path}: is damaged; restore it with `dvc checkout {folder}` or make it again")
    return found


def verify(folder: Path) -> Manifest:
    """The manifest, after checking that every file is there, unchanged, and none is a pickle.

    Raises TpawError naming the file.
    """
    found = manifest(folder)
    remedy = f"restore it with `dvc checkout --force {folder}` or make the checkpoint again"
    for path in folder.iterdir():
        if path.suffix in PICKLE:
            raise TpawError(f"{path}: is a pickle file, which can run code when loaded; use safetensors")
        if path.name != MANIFEST and path.name not in found["files"]:
            raise TpawError(f"{path}: is not in the manifest; remove it, or {remedy}")
    for name, sha in found["files"].items():
        path = folder / name
        if Path(name).name != name:
            raise TpawError(f"{folder / MANIFEST}: {name!r} leaves the checkpoint's folder")
        if not path.is_file():
            raise TpawError(f"{path}: is missing; {remedy}")
        if workspace.sha256(path) != sha:
            raise TpawError(f"{path}: has changed since it was made; {remedy}")
    return found


def load_tokenizer(source: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    tokenizer = _load(AutoTokenizer, source, revision)
    for name in ("is_local", "local_files_only"):  # how it was loaded would be saved with it, and change the digest
        tokenizer.init_kwargs.pop(name, None)
    return tokenizer


def load_model(source: str | Path, *, dtype: str = "auto", revision: str | None = None) -> PreTrainedModel:
    """The model in evaluation mode on the accelerator, if there is one."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = _load(AutoModelForCausalLM, source, revision, dtype=dtype, use_safetensors=True)
    # What a model brings along (a repetition penalty, a minimal length) would sample from something else than pi.
    model.generation_config = GenerationConfig(eos_token_id=model.config.eos_token_id)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _load(loader: Any, source: str | Path, revision: str | None, **options: Any) -> Any:
    from safetensors import SafetensorError

    if Path(source).is_dir():
        pickles = [p for p in Path(source).iterdir() if p.suffix in PICKLE]
        if pickles and not list(Path(source).glob("*.safetensors")):
            raise TpawError(f"{pickles[0]}: is a pickle file, which can run code when loaded; use safetensors")
    try:
        return loader.from_pretrained(source, revision=revision, trust_remote_code=False, **options)
    except (OSError, ValueError, SafetensorError) as error:
        offline = (
            " HF_HUB_OFFLINE is set: unset it, or name a local folder." if os.environ.get("HF_HUB_OFFLINE") else ""
        )
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TpawError(f"model {str(source)!r}: cannot be loaded.{offline} ({first})") from None
