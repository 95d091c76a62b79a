"""What can go: checkpoints that no team, alias or setting needs any more, and all that was kept for them.

A lineage stays whole: of a checkpoint that goes, the manifest, its synthetic data, weights, logs and figures stay. Kept
are checkpoint 0, from which a changed setting starts again; the members of the next team; what has an alias in MLflow;
and in DVC's cache what a git tag names.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpaw_core import checkpoint, stages, team, workspace
from tpaw_core.config import Params
from tpaw_core.errors import TpawError
from tpaw_core.workspace import Removal

if TYPE_CHECKING:
    from tpaw_core.registry import Registry


def removals(params: Params, registry: Registry | None) -> list[Removal]:
    """What `tpaw prune` frees, in the order of freeing. Touches nothing.

    Raises TpawError where nobody is left to play: what the next team needs is then unknown.
    """
    made = workspace.iterations("checkpoints")
    if not made:
        return []
    kept = _kept(params, registry, made)
    digests = {t: checkpoint.manifest(workspace.checkpoint(t))["digest"] for t in made}
    found = registry.removals({digests[t] for t in kept}) if registry else []
    gone = [t for t in made if t not in kept]
    found += [_checkpoint(t) for t in gone]
    found += [_files(f"{path}, left by a prune that was stopped", path) for path in _going()]
    found += _cache({workspace.checkpoint(t) for t in [*gone, *_pruned()]})
    needed = {digests[t][:32] for t in kept}
    found += [
        _files(f"scores of checkpoint {path.name[:12]}", path)
        for path in sorted(workspace.SCORES.glob("*"))
        if path.name not in needed
    ]
    found += [
        _files(f"state of a stopped training, {path}", path)
        for path in sorted(workspace.TRAINING_STATE.glob("*"))
        if int(path.name.partition("-")[0]) in made
    ]
    return found


def _kept(params: Params, registry: Registry | None, made: list[int]) -> set[int]:
    last = max(made)
    candidates = stages.candidates(last + 1, registry)
    try:
        members = team.assemble(candidates, iteration=last + 1, size=params.team.size, exclude=params.team.exclude)
    except ValueError as error:
        raise TpawError(f"prune: {error}; what the next team needs is not known, so nothing can go") from None
    named = registry.aliased() if registry else set()
    return {
        t
        for t in made
        if t in (0, last, *(member.iteration for member in members))
        or checkpoint.manifest(workspace.checkpoint(t))["digest"] in named
        or not workspace.metrics(t).exists()  # not yet measured
    }


def _going() -> list[Path]:
    return sorted(workspace.checkpoint(0).parent.glob(".*-going"))


def _pruned() -> list[int]:
    folder = workspace.pruned(0).parent
    return [int(path.stem) for path in folder.glob("*.json") if not workspace.checkpoint(int(path.stem)).exists()]


def _checkpoint(iteration: int) -> Removal:
    folder = workspace.checkpoint(iteration)

    def remove() -> None:
        if folder.exists():
            manifest = checkpoint.manifest(folder)
            with workspace.publish(workspace.pruned(iteration)) as aside:
                aside.write_text(json.dumps(manifest, indent=2) + "\n")
            going = folder.rename(folder.with_name(f".{iteration}-going"))  # never half a checkpoint
            shutil.rmtree(going)

    return Removal(f"{folder}", _size(folder), remove)


def _files(what: str, folder: Path) -> Removal:
    return Removal(what, _size(folder), partial(shutil.rmtree, folder, ignore_errors=True))


def _cache(gone: set[Path]) -> list[Removal]:
    """Objects in DVC's cache that neither this workspace, less what goes, nor a git tag names."""
    if not Path(".dvc").is_dir():
        return []
    from dvc.repo import Repo
    from dvc.scm import NoSCM

    with Repo() as repo:
        needed = _objects(repo, gone)
        if not isinstance(repo.scm, NoSCM):
            for _ in repo.brancher(all_tags=True, workspace=False):
                needed |= _objects(repo, set())
        objects = sorted(Path(repo.cache.local.path).glob("??/*"))
    objects = [path for path in objects if path.parent.name + path.name not in needed]
    # What is a hard link to a checkpoint that goes is counted there.
    size = sum(path.stat().st_size for path in objects if path.stat().st_nlink == 1)

    def remove() -> None:
        for path in objects:
            path.unlink(missing_ok=True)

    return [Removal(f"{len(objects)} objects in DVC's cache", size, remove)] if objects else []


def _objects(repo: Any, without: set[Path]) -> set[str]:
    outs = [out for out in repo.index.outs if Path(repo.fs.relpath(out.fs_path, repo.root_dir)) not in without]
    return {info.value for out in outs for infos in out.get_used_objs().values() for info in infos}


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
