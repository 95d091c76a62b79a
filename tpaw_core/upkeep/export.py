"""An adapter and its base as one whole model, for whatever loads plain models."""

from __future__ import annotations

import shutil
from pathlib import Path

from tpaw_core.artifacts import adapters, checkpoint
from tpaw_core.errors import TpawError
from tpaw_core.launch.source import Source
from tpaw_core.stages import members
from tpaw_core.stages.context import Context
from tpaw_core.workspace import files


def export(context: Context, iteration: int, folder: Path) -> None:
    """Write checkpoint t to ``folder``, merged in float32 from the base as it was trained on: in bfloat16.

    Raises TpawError where ``folder`` exists, the checkpoint is whole already, or a file is missing or changed.
    """
    if folder.exists():
        raise TpawError(f"{folder}: already exists; choose a new folder")
    workspace = context.workspace
    manifest, source = checkpoint.verify(workspace, iteration), workspace.checkpoint(iteration)
    if manifest.base is None:
        raise TpawError(f"{source}: is already a whole model; use it as it is")
    model = Source(*members.place(context, manifest.base), "bfloat16").load_base(device="cpu")
    adapters.use(model, source, manifest.digest)
    adapters.merge(model)
    with files.publish(folder) as aside:
        model.save_pretrained(aside)
        for path in source.iterdir():
            if path.name not in (adapters.CONFIG, adapters.WEIGHTS, checkpoint.MANIFEST):
                shutil.copy(path, aside)
