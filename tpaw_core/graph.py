"""The graph of stages, read from dvc.yaml: in which order they run, and what decides the bytes of each one's outputs.

DVC uses that file to skip what is up to date in one workspace; a study uses it to share work between many.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

from tpaw_core import checkpoint, config, workspace
from tpaw_core.config import Params

GRAPH_FILE = Path("dvc.yaml")


class Stage(NamedTuple):
    """One stage; paths are relative to a workspace."""

    name: str  # as DVC calls it: sft, train@2
    command: str  # the sub-command of tpaw
    iteration: int | None
    deps: tuple[Path, ...]
    params: tuple[str, ...]  # dotted keys
    outs: tuple[Path, ...]


def read(params: Params, path: Path = GRAPH_FILE) -> list[Stage]:
    """The stages that make and evaluate every checkpoint, in the order of running; the report is left out.

    Fine-tuning that goes on (objective.name=sft) has no answers, teams and weights.
    """
    found: dict[str, Stage] = {}
    for name, entry in config.read_yaml(path)["stages"].items():
        if "foreach" not in entry:
            found[name] = _stage(name, entry, {})
            continue
        for key, item in params.iterations.items():
            values = {"key": key, "item.previous": str(item.previous)}
            found[f"{name}@{key}"] = _stage(f"{name}@{key}", entry["do"], values)
    alone = params.objective.name == "sft"
    steps = ("train", "evaluate") if alone else ("generate", "team", "weights", "train", "evaluate")
    names = ["sft", "evaluate-sft", *(f"{name}@{key}" for key in params.iterations for name in steps)]
    if alone:
        for key in params.iterations:
            stage = found[f"train@{key}"]
            deps = (workspace.checkpoint(int(key) - 1), workspace.TRAIN_ROWS)
            found[stage.name] = stage._replace(deps=deps)
    return [found[name] for name in names]


def key(stage: Stage, params: Params) -> str:
    """Digest of all that decides what ``stage`` writes in the current workspace: equal keys, equal outputs.

    Raises TpawError where something that the stage reads is missing.
    """
    tree = params.model_dump(mode="json", by_alias=True)
    deps = {str(path): _digest(path) for path in stage.deps if path != workspace.training_log(0)}
    return config.digest([stage.name, {name: _value(tree, name) for name in stage.params}, deps])


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


def _digest(path: Path) -> str:
    if path.is_dir():
        return checkpoint.manifest(path)["digest"]
    return workspace.sha256(workspace.need(path, "the stage before makes it"))


def _value(tree: Any, name: str) -> Any:
    for part in name.split("."):
        tree = tree[part]
    return tree
