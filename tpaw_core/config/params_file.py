"""The parameters: one typed tree, one YAML file, dotted overrides. Field names are Hugging Face's where they have one.

Knows YAML and types; must not know torch, stages or services.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from io import StringIO
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML

from tpaw_core.config.optimisation import one_batch_size
from tpaw_core.config.params import Iteration, Params
from tpaw_core.config.section import Section
from tpaw_core.errors import TpawError
from tpaw_core.workspace import files
from tpaw_core.workspace.paths import Workspace


def read_yaml(path: Path) -> Any:
    """The tree in a YAML file, comments kept for writing it again."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise TpawError(
            f"{path}: no such file; run this from the project's folder, or create it with `tpaw use demo`"
        ) from None
    except UnicodeDecodeError as error:
        raise TpawError(f"{path}: not valid YAML: {error}") from None
    tree = _parse(_yaml(), text, str(path))
    if not isinstance(tree, dict):
        raise TpawError(f"{path}: expected a mapping of sections, found {type(tree).__name__}")
    return tree


def _parse(yaml: YAML, text: str, source: str) -> Any:
    try:
        return yaml.load(text)
    except Exception as error:  # the parser also lets through what a malformed tag or number raises
        raise TpawError(f"{source}: not valid YAML: {str(error) or type(error).__name__}") from None


def load(path: Path) -> Params:
    return validate(read_yaml(path), str(path))


def recipe_path(workspace: Workspace, name: str) -> Path:
    path = workspace.input(name) if name.endswith((".yaml", ".yml")) else workspace.recipes / f"{name}.yaml"
    if not path.exists():
        known = sorted(p.stem for p in workspace.recipes.glob("*.yaml"))
        raise TpawError(f"recipe {name!r}: no such recipe{_near(name, known)}; available: {', '.join(known)}")
    return path


def read_template(workspace: Workspace, given: str) -> str:
    """model.chat_template as text: given as such, or in a file.

    Raises TpawError where that is missing, not text in UTF-8, or contains no template.
    """
    if "{" in given:
        return given
    path = files.need(
        workspace.input(given), "model.chat_template must be a Jinja template, or the path of a file that contains one"
    )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        raise TpawError(f"{path}: is not a UTF-8 text file, as model.chat_template requires") from None
    if "{" not in text:
        raise TpawError(f"{path}: contains no Jinja template, which model.chat_template needs")
    return text


def resolve(
    workspace: Workspace, recipe: str | None, overrides: Iterable[str] = (), iterations: int | None = None
) -> tuple[Params, str]:
    """Params after switching to ``recipe`` (None: stay with params.yaml) and applying dotted ``overrides``.

    ``iterations`` lengthens the list of iterations where it is too short; it never shortens it. Returns the params and
    their YAML text with every default written out: DVC tracks values, and cannot track what is left out.
    """
    source = workspace.params_file if recipe is None else recipe_path(workspace, recipe)
    tree, overrides = read_yaml(source), list(overrides)
    for section in ("sft", "training"):
        one_batch_size(tree.get(section))
    for override in overrides:
        _override(tree, override)
    model = tree.get("model")
    given = model.get("chat_template") if isinstance(model, dict) else None
    if (
        isinstance(given, str) and "{" not in given and workspace.input(given).exists()
    ):  # DVC tracks values, not what they name
        model["chat_template"] = read_template(workspace, given)
    known = tree.get("iterations")
    if isinstance(known, dict):
        for number in range(1, max(len(known), iterations or 0) + 1):
            before, own = (known.get(str(n), {}) for n in (number - 1, number))
            if isinstance(before, dict) and isinstance(own, dict) and "previous" not in own:
                known[str(number)] = {**before, **own, "previous": number - 1}
    keys = ", ".join(override.partition("=")[0] for override in overrides)
    params = validate(tree, f"{source} with {keys} given" if keys else str(source))
    _write_out(tree, params.model_dump(mode="json", by_alias=True, exclude={"iterations"}))
    text = StringIO()
    _yaml().dump(tree, text)
    return params, text.getvalue()


def switch(
    workspace: Workspace, recipe: str | None, overrides: Iterable[str] = (), iterations: int | None = None
) -> Params:
    """Resolve, and write params.yaml where that changes it."""
    params, text = resolve(workspace, recipe, overrides, iterations)
    path = workspace.params_file
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        with workspace.publish(path) as aside:
            aside.write_text(text, encoding="utf-8")
    return params


def validate(tree: Mapping[str, Any], source: str) -> Params:
    try:
        plain = json.loads(json.dumps(tree))
    except (TypeError, ValueError, RecursionError) as error:  # a tag, a date, an alias within itself
        raise TpawError(f"{source}: contains a value of an unsupported type ({error}); quote it as text") from None
    try:
        return Params.model_validate(plain)
    except ValidationError as error:
        raise TpawError("\n".join(_explain(item, source) for item in error.errors())) from None


def _yaml() -> YAML:
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 120
    return yaml


def _write_out(tree: dict[str, Any], full: Mapping[str, Any]) -> None:
    for key, value in full.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _write_out(tree[key], value)
        else:
            tree.setdefault(key, value)


def _override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise TpawError(f"override {override!r}: write it as section.key=value, e.g. objective.eta=4")
    *parents, last = key.split(".")
    for parent in parents:
        if not isinstance(tree, dict):
            raise TpawError(f"override {override!r}: {parent!r} is nested under a plain value, not a section")
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
    if not isinstance(tree, dict):
        raise TpawError(f"override {override!r}: {last!r} is nested under a plain value, not a section")
    tree[last] = text if _is_text(key, text) else _parse(YAML(typ="safe"), text, f"override {override!r}")


def _is_text(key: str, text: str) -> bool:
    """Whether an override means its characters as they are: a text's # or [ is not YAML's."""
    model: Any = Params
    for part in key.split("."):
        fields = (
            {field.alias or name: field for name, field in model.model_fields.items()} if _is_section(model) else {}
        )
        if part not in fields:
            return False
        model = fields[part].annotation
    quoted = text[:1] in ("'", '"') and text[-1:] == text[:1] and len(text) > 1
    return (model is str or model == (str | None)) and not quoted and text not in ("", "null", "~")


def _explain(item: Any, source: str) -> str:
    location = [str(part) for part in item["loc"]]
    key = ".".join(location)
    if item["type"] == "extra_forbidden":
        return f"{source}: unknown key {key!r}{_near(location[-1], _fields(location[:-1]))}; remove it or fix its name"
    if item["type"] == "missing":
        return f"{source}: {key!r} is missing; add it"
    message = item["msg"].removeprefix("Value error, ").removesuffix(", unable to interpret input")
    got = "" if isinstance(item["input"], dict) else f", got {item['input']!r}"
    return f"{source}: {key}: {message}{got}" if key else f"{source}: {message}"


def _fields(location: list[str]) -> list[str]:
    model: Any = Params
    for part in location:
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            break
        if model is Iteration:  # the iteration's number is not a field
            continue
        if part not in model.model_fields:
            return []
        annotation = model.model_fields[part].annotation
        model = next((a for a in (annotation, *get_args(annotation)) if _is_section(a)), Iteration)
    return [field.alias or name for name, field in model.model_fields.items()] if _is_section(model) else []


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _near(word: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""
