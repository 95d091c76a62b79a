"""What this workspace has registered: distinguishes a deleted version from one that was never made."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

from tpaw_core.workspace import records
from tpaw_core.workspace.paths import Workspace


def read(workspace: Workspace) -> dict[str, dict[str, int]]:
    """Server -> digest -> version."""
    path = _path(workspace)
    return records.read(path, dict[str, dict[str, int]], "delete it") if path.exists() else {}


def add(workspace: Workspace, server: str, digest: str, version: int) -> None:
    everywhere = read(workspace)
    everywhere[server] = {**everywhere.get(server, {}), digest: version}
    with workspace.publish(_path(workspace)) as aside:
        aside.write_text(json.dumps(everywhere, indent=1))


def workspace_id(workspace: Workspace) -> str:
    """A name that stays with this workspace, wherever it is moved or mounted."""
    path = workspace.state / "workspace"
    if not path.exists():
        with workspace.publish(path) as aside:
            aside.write_text(uuid.uuid4().hex)
    return path.read_text().strip()


def _path(workspace: Workspace) -> Path:
    return workspace.state / "registered.json"
