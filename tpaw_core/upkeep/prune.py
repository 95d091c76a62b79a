"""What can be deleted: checkpoints that no team, alias or setting needs any more, and what was kept for them.

A lineage stays whole: of a deleted checkpoint, the manifest, its synthetic data, weights, logs and figures stay. Kept
are checkpoint 0, from which a changed setting starts again; the members of the next team; what has an alias in MLflow;
the base of an adapter that is kept; and in DVC's cache what a git tag names.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

from tpaw_core.artifacts import checkpoint
from tpaw_core.errors import TpawError
from tpaw_core.method.team import assemble
from tpaw_core.stages.context import Context
from tpaw_core.workspace.files import Deletion
from tpaw_core.workspace.paths import Workspace


def deletions(context: Context) -> list[Deletion]:
    """What `tpaw prune` deletes, in that order. Touches nothing.

    Raises TpawError where nobody is left to play: what the next team needs is then unknown.
    """
    workspace, registry = context.workspace, context.registry
    made = workspace.iterations("checkpoints")
    if not made:
        return []
    kept = _kept(context, made)
    digests = {t: checkpoint.manifest(workspace, t).digest for t in made}
    found = registry.deletions({digests[t] for t in kept}) if registry else []
    gone = [t for t in made if t not in kept]
    found += [_checkpoint(workspace, t) for t in gone]
    leftovers = sorted(workspace.checkpoint(0).parent.glob(".*-going"))
    found += [_files(f"{path}, left by an interrupted prune", path) for path in leftovers]
    found += _cache(workspace, {Path(workspace.name(workspace.checkpoint(t))) for t in [*gone, *_pruned(workspace)]})
    needed = {digests[t][:32] for t in kept}
    found += [
        _files(f"scores of checkpoint {path.name[:12]}", path)
        for path in sorted(workspace.scores.glob("*"))
        if path.name not in needed
    ]
    found += [
        _files(f"state of an interrupted training run, {path}", path)
        for path in sorted(workspace.training_state.glob("*"))
        if int(path.name.partition("-")[0]) in made
    ]
    return found


def _kept(context: Context, made: list[int]) -> set[int]:
    workspace, registry, settings, last = context.workspace, context.registry, context.params.team, max(made)
    candidates = context.candidates(last + 1)
    try:
        members = assemble(candidates, iteration=last + 1, size=settings.size, exclude=settings.exclude)
    except ValueError as error:
        raise TpawError(f"prune: {error}; what the next team needs is unknown, so nothing can be deleted") from None
    named = registry.aliased() if registry else set()
    manifests = {t: checkpoint.manifest(workspace, t) for t in made}
    kept = {
        t
        for t in made
        if t in (0, last, *(member.iteration for member in members))
        or manifests[t].digest in named
        or not workspace.metrics(t).exists()  # not yet measured
    }
    bases = {base.digest for t in kept if (base := manifests[t].base) is not None}
    return kept | {t for t in made if manifests[t].digest in bases}


def _pruned(workspace: Workspace) -> list[int]:
    found = [int(path.stem) for path in workspace.pruned(0).parent.glob("*.json")]
    return [t for t in found if not workspace.checkpoint(t).exists()]


def _checkpoint(workspace: Workspace, iteration: int) -> Deletion:
    folder = workspace.checkpoint(iteration)

    def delete() -> None:
        if folder.exists():
            manifest = checkpoint.manifest(workspace, iteration)
            with workspace.publish(workspace.pruned(iteration)) as aside:
                aside.write_text(manifest.text())
            going = folder.rename(folder.with_name(f".{iteration}-going"))  # never half a checkpoint
            shutil.rmtree(going)

    return Deletion(f"{folder}", _size(folder), delete)


def _files(what: str, folder: Path) -> Deletion:
    return Deletion(what, _size(folder), partial(shutil.rmtree, folder, ignore_errors=True))


def _cache(workspace: Workspace, gone: set[Path]) -> list[Deletion]:
    """Objects in DVC's cache that neither this workspace, less what is deleted, nor a git tag names."""
    if not (workspace.root / ".dvc").is_dir():
        return []
    from dvc.repo import Repo
    from dvc.scm import NoSCM

    with Repo(str(workspace.root)) as repo:
        needed = _objects(repo, gone)
        if not isinstance(repo.scm, NoSCM):
            for _ in repo.brancher(all_tags=True, workspace=False):
                needed |= _objects(repo, set())
        objects = sorted(Path(repo.cache.local.path).glob("??/*"))
    objects = [path for path in objects if path.parent.name + path.name not in needed]
    # What is a hard link to a checkpoint that is deleted too is counted there.
    size = sum(path.stat().st_size for path in objects if path.stat().st_nlink == 1)

    def delete() -> None:
        for path in objects:
            path.unlink(missing_ok=True)

    return [Deletion(f"{len(objects)} objects in DVC's cache", size, delete)] if objects else []


def _objects(repo: Any, without: set[Path]) -> set[str]:
    outs = [out for out in repo.index.outs if Path(repo.fs.relpath(out.fs_path, repo.root_dir)) not in without]
    return {info.value for out in outs for infos in out.get_used_objs().values() for info in infos}


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
