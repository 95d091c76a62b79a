"""Where a checkpoint comes from: its manifest, its parent's, and so on back to the base model."""

from __future__ import annotations

from collections.abc import Iterator

from tpaw_core.artifacts import checkpoint, code
from tpaw_core.artifacts.checkpoint import Manifest
from tpaw_core.config.params import flat
from tpaw_core.errors import TpawError
from tpaw_core.workspace.paths import Workspace


def ancestors(workspace: Workspace, iteration: int) -> Iterator[Manifest]:
    """The manifests from checkpoint ``iteration`` back to checkpoint 0; pruned ones too.

    Raises TpawError where one is missing or a parent is not what its child was trained from.
    """
    child: Manifest | None = None
    for earlier in range(iteration, -1, -1):
        found = checkpoint.manifest(workspace, earlier)
        if child is not None and child.parent != found.digest:
            raise TpawError(
                f"checkpoints/{earlier}: is not what checkpoints/{earlier + 1} was trained from "
                f"({found.digest[:12]}, not {str(child.parent)[:12]}); run `dvc repro`"
            )
        yield found
        child = found


def text(workspace: Workspace, iteration: int) -> str:
    """The lineage as lines, newest first."""
    lines = []
    for found in ancestors(workspace, iteration):
        lines.append(f"checkpoint {found.iteration}  {found.digest}")
        facts = {
            "trained from": found.parent,
            "an adapter on": found.base and f"{found.base.source} {found.base.revision or ''} {found.base.digest}",
            "team": ", ".join(digest[:12] for digest in found.team),
            **{f"read {name}": digest for name, digest in found.made_from.items()},
            "params": " ".join(f"{name}={value}" for name, value in flat(found.params).items()),
            "made with": " ".join(f"{name} {version}" for name, version in found.versions.items()),
            "code digests": " ".join(f"{part} {digest[:12]}" for part, digest in found.code.items()),
            "differs from the installed code in": ", ".join(code.changed(found.code)),
        }
        lines += [f"    {name}: {value}" for name, value in facts.items() if value]
    return "\n".join(lines)
