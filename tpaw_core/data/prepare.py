"""data/: the rows that a recipe asks for, checked, split and written; origin.json records what they were made from."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

from tpaw_core.config.params import Data
from tpaw_core.data import arithmetic, sources
from tpaw_core.data.mawps import as_prompt_and_equation
from tpaw_core.data.messages import Unusable
from tpaw_core.data.rows import Row, prompt_digest, refuse_if_too_many, usable_row
from tpaw_core.data.sources import Source
from tpaw_core.errors import TpawError
from tpaw_core.workspace import files, records
from tpaw_core.workspace.paths import Workspace
from tpaw_core.workspace.records import Record

# `tpaw data` replaces what is in data/: what was put there by hand, no cache may hold.
AGAIN = "move data/ away if it contains the only copy of your rows, then run `tpaw data`"
logger = logging.getLogger(__name__)


class Origin(Record):
    """data/origin.json."""

    made_from: str  # digest of settings, seed and source files
    rows: dict[str, int]
    files: dict[str, str]  # name -> SHA-256


def prepare(workspace: Workspace, data: Data, seed: int) -> dict[str, int]:
    """Write data/train.jsonl and data/heldout.jsonl from the recipe's source. Returns the number of rows of each.

    Reads: data.path (and heldout_path). Writes: data/. Refuses: a source in data/, a missing, empty or broken file,
    more than data.max_skipped unusable rows, one prompt in both train and held-out.
    """
    local = _local_sources(workspace, data)
    for path in local:
        _refuse_inside(workspace.data, path)
    made_from = _made_from(workspace, local, data, seed)
    if (counts := _up_to_date(workspace, made_from)) is not None:
        return counts
    if data.path == "arithmetic":
        train_count, heldout_count = data.max_train_rows or 4000, data.max_heldout_rows or 1000
        pairs = [
            {"prompt": problem, "completion": answer}
            for problem, answer in arithmetic.problems(train_count + heldout_count, seed)
        ]
        numbered = [(f"row {number}", pair) for number, pair in enumerate(pairs, start=1)]
        train, heldout = (Source(data.path, part) for part in (numbered[:train_count], numbered[train_count:]))
    elif local:
        if len(local) == 1 and not sources.has_splits(local[0]):
            raise TpawError("data.heldout_path: set it to the file with the held-out rows")
        train, heldout = sources.read(local[0], data.train_split), sources.read(local[-1], data.heldout_split)
    else:
        train, heldout = (sources.read_hub(data, split) for split in (data.train_split, data.heldout_split))
    paths = {"train": workspace.train_rows, "heldout": workspace.heldout_rows}
    if data.validation_rows is not None:
        paths["validation"] = workspace.validation_rows
    with ExitStack() as stack:
        aside = {name: stack.enter_context(workspace.publish(path)) for name, path in paths.items()}
        prompts: set[bytes] = set()
        counts = {"train": _write(aside["train"], _noted(_usable(train, data, data.max_train_rows), prompts))}
        held = _apart(_usable(heldout, data, data.max_heldout_rows), prompts, heldout.name, data.drop_overlap)
        if data.validation_rows is not None:
            counts["validation"] = _write(aside["validation"], islice(held, data.validation_rows))
        counts["heldout"] = _write(aside["heldout"], held)
        if not counts["heldout"]:
            raise TpawError(f"data.validation_rows: {data.validation_rows} leaves no held-out rows; lower it")
    if data.validation_rows is None:
        workspace.validation_rows.unlink(missing_ok=True)
    sums = {path.name: files.sha256(path) for path in paths.values()}
    with workspace.publish(_origin(workspace)) as aside_origin:
        aside_origin.write_text(Origin(made_from=made_from, rows=counts, files=sums).text())
    return counts


def _write(path: Path, rows: Iterable[Row]) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(row.text())
            count += 1
    return count


def _origin(workspace: Workspace) -> Path:
    return workspace.data / "origin.json"


def _local_sources(workspace: Workspace, data: Data) -> list[Path]:
    """The files or folders that hold training rows and, where they are named, held-out rows; none: hub or generated."""
    if data.path == "arithmetic" or not sources.is_local(workspace.input(data.path)):
        return []
    return [workspace.input(path) for path in (data.path, data.heldout_path) if path is not None]


def _refuse_inside(folder: Path, source: Path) -> None:
    """What is read from data/ would be replaced by what is made of it."""
    made, given = folder.resolve(), source.resolve()
    linked = [path for path in sources.files_of(given) if path.resolve().is_relative_to(made)]
    if linked or given.is_relative_to(made) or (given.is_dir() and made.is_relative_to(given)):
        what = f"is inside {folder}/" if given.is_relative_to(made) else f"contains files from {folder}/"
        raise TpawError(
            f"{source}: {what}, which `tpaw data` writes; move your rows to another folder, and set "
            "data.path and data.heldout_path to their new location. Nothing was changed"
        )


def _made_from(workspace: Workspace, local: list[Path], data: Data, seed: int) -> str:
    """Digest of everything that decides the rows: settings, seed, and the bytes of local files."""
    sums: list[Any] = []
    for path in local:
        if path.is_dir():
            found = sources.files_of(path)
            names = [file.relative_to(path).as_posix() for file in found]
            sums.append(dict(zip(names, workspace.sha256s(found), strict=True)))
        elif path.is_file():
            sums.append(workspace.sha256(path))
    return files.digest([data.model_dump(exclude={"max_self_play_rows"}), seed, sums])


def _up_to_date(workspace: Workspace, made_from: str) -> dict[str, int] | None:
    """The numbers of rows in data/ where it is unchanged and was made from the same."""
    try:
        found = records.read(_origin(workspace), Origin)
        same = all(workspace.sha256(workspace.data / name) == sha for name, sha in found.files.items())
        return found.rows if same and found.made_from == made_from else None
    except (OSError, TpawError):
        return None


def verify(workspace: Workspace, *, must_exist: bool = False) -> None:
    """Raise TpawError where a file in data/ is not as `prepare` made it; rows without origin.json were put there."""
    origin = _origin(workspace)
    if not origin.exists() and not must_exist:
        return
    for name, sha in records.read(files.need(origin, AGAIN), Origin, AGAIN).files.items():
        path = files.need(workspace.data / Path(name).name, AGAIN)
        if workspace.sha256(path) != sha:
            raise TpawError(
                f"{path}: has changed since `tpaw data` made it; {AGAIN}. Do not edit files in data/ by hand"
            )


def _noted(rows: Iterable[Row], prompts: set[bytes]) -> Iterator[Row]:
    for row in rows:
        prompts.add(prompt_digest(row))
        yield row


def _apart(heldout: Iterable[Row], train: set[bytes], name: str, drop_overlap: bool) -> Iterator[Row]:
    """The held-out rows whose prompt is not in train."""
    first, shared, total = None, 0, 0
    for row in heldout:
        total += 1
        if prompt_digest(row) not in train:
            yield row
            continue
        shared += 1
        first = first or row
    if first is not None and not drop_overlap:
        raise TpawError(
            f"{name}: {shared} held-out prompts are also in train; the first is "
            f"{first.prompt[-1]['content'][:60]!r}; remove them from one of the two, "
            "or set data.drop_overlap=true to leave them out of held-out"
        )
    if shared == total:
        raise TpawError(f"{name}: every held-out prompt is also in train; use different held-out rows")
    if shared:
        logger.info("%s: %d of %d held-out rows left out, as their prompts are in train", name, shared, total)


def _usable(source: Source, data: Data, limit: int | None) -> Iterator[Row]:
    """The distinct usable rows, at most ``limit``."""
    name, total, repeated = source.name, 0, 0
    reasons: list[str] = []
    seen: set[str] = set()
    for place, item in source.items:
        if limit is not None and len(seen) == limit:
            break
        total += 1
        try:
            row = usable_row(as_prompt_and_equation(item) if data.format == "mawps" else item, data)
        except Unusable as reason:
            reasons.append(f"{place}: {reason}")
            continue
        if row.prompt_id in seen:
            repeated += 1
            continue
        seen.add(row.prompt_id)
        yield row
    if repeated:
        logger.info("%s: %d of %d rows repeat an earlier row and are left out", name, repeated, total)
    refuse_if_too_many(name, reasons, total, data.max_skipped)
    if not seen:
        raise TpawError(f"{name}: contains no usable rows")
