"""The graph of stages, read from dvc.yaml: their order, and what decides the bytes of their outputs.

DVC uses that file to skip what is up to date in one workspace; a study uses it to share work between many.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

from tpaw_core.artifacts import checkpoint
from tpaw_core.config import params_file
from tpaw_core.config.params import Params
from tpaw_core.workspace import files
from tpaw_core.workspace.paths import Workspace

GRAPH_FILE = "dvc.yaml"
RELATIVE = Workspace()


class Stage(NamedTuple):
    """One stage; paths are relative to a workspace."""

    name: str  # as DVC calls it: sft, train@2
    command: str  # the sub-command of tpaw
    iteration: int | None
    deps: tuple[Path, ...]
    params: tuple[str, ...]  # dotted keys
    outs: tuple[Path, ...]


def read_graph(path: Path, params: Params) -> list[Stage]:
    """The stages that make and evaluate every checkpoint, in the order of running; the report is left out.

    With objective.name=sft there are no answers, teams and weights: fine-tuning continues.
    """
    found: dict[str, Stage] = {}
    for name, entry in params_file.read_yaml(path)["stages"].items():
        if "foreach" not in entry:
            found[name] = _stage(name, entry, {})
            continue
        for key, item in params.iterations.items():
            values = {"key": key, "item.previous": str(item.previous)}
            found[f"{name}@{key}"] = _stage(f"{name}@{key}", entry["do"], values)
    alone = params.objective.name == "sft"
    steps = ("train", "evaluate") if alone else ("generate", "team", "weights", "train", "evaluate")
    names = ["encode", "sft", "evaluate-sft", *(f"{name}@{key}" for key in params.iterations for name in steps)]
    if alone:
        for key in params.iterations:
            stage = found[f"train@{key}"]
            deps = (RELATIVE.checkpoint(int(key) - 1), RELATIVE.tokenizer, RELATIVE.encoded("train"))
            found[stage.name] = stage._replace(deps=deps)
    return [found[name] for name in names]


def key(workspace: Workspace, stage: Stage, params: Params) -> str:
    """Digest of everything that decides what ``stage`` writes in ``workspace``: equal keys, equal outputs.

    Raises TpawError where something that the stage reads is missing.
    """
    tree = params.model_dump(mode="json", by_alias=True)
    deps = {str(path): _digest(workspace, path) for path in stage.deps if path != RELATIVE.training_log(0)}
    return files.digest([stage.name, {name: _value(tree, name) for name in stage.params}, deps])


def _stage(name: str, entry: Any, values: dict[str, str]) -> Stage:
    def filled(text: str) -> str:
        return re.sub(r"\$\{([^}]+)\}", lambda match: values[match.group(1)], text)

    def named(key: str) -> tuple[str, ...]:
        return tuple(filled(item if isinstance(item, str) else next(iter(item))) for item in entry.get(key, ()))

    _, command, *options = shlex.split(filled(entry["cmd"]))
    return Stage(
        name,
        command,
        int(options[1]) if options else None,
        tuple(map(Path, named("deps"))),
        named("params"),
        tuple(map(Path, named("outs") + named("metrics"))),
    )


def _digest(workspace: Workspace, path: Path) -> str:
    if path.parts[0] == "checkpoints":
        return checkpoint.manifest(workspace, int(path.name)).digest
    path = files.need(workspace.root / path, "the previous stage creates it")
    if path.is_dir():
        found = sorted(path.iterdir())
        return files.digest(dict(zip([file.name for file in found], workspace.sha256s(found), strict=True)))
    return workspace.sha256(path)


def _value(tree: Any, name: str) -> Any:
    for part in name.split("."):
        tree = tree[part]
    return tree
