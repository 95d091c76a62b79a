"""Where rows come from: a file, a folder of shards, a data set of `save_to_disk` or of the hub; one item at a time."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tpaw_core.config.params import Data
from tpaw_core.data.formats import FORMATS, has_format, read_file, without_nulls
from tpaw_core.errors import TpawError

BESIDE_SHARDS = re.compile(
    r"\.|readme|licen[cs]e|notice|citation|dataset_infos?\.json|_success|_(common_)?metadata|.*\.md$", re.IGNORECASE
)
WORDS = r"train(?:ing)?|test(?:ing)?|valid(?:ation)?|val|dev|eval(?:uation)?|held[_-]?out"
SPLIT = re.compile(rf"(?:^|[/._ -])((?:{WORDS})(?:_[a-z]+)*)(?![a-z])")  # with the words behind it: train_sft


class Source(NamedTuple):
    name: str  # for messages
    items: Iterable[tuple[str, Any]]  # each with its place: row 5, or b.jsonl: row 5


def is_local(path: Path) -> bool:
    """Whether a recipe means a file or a folder; anything else is a hub id."""
    return path.exists() or has_format(path)


def read(path: Path, split: str) -> Source:
    """The rows of a file or a folder; ``split``: which, where a folder holds several."""
    if not path.is_dir():
        return Source(str(path), _numbered(read_file(path)))
    if (path / "dataset_dict.json").exists():
        if not (path / split).is_dir():
            raise TpawError(f"{path}: has no split {split!r}; set data.train_split or data.heldout_split")
        return Source(f"{path}[{split}]", _numbered(_saved(path / split)))
    if (path / "state.json").exists():
        return Source(str(path), _numbered(_saved(path)))
    return Source(str(path), _sharded(path, _shards(path, split)))


def has_splits(path: Path) -> bool:
    """Whether a folder holds training and held-out rows apart."""
    return path.is_dir() and ((path / "dataset_dict.json").exists() or len(_splits(path).keys() - {None}) > 1)


def files_of(path: Path) -> list[Path]:
    """The files whose bytes decide a source's rows."""
    if path.is_file():
        return [path]
    found = sorted(path.rglob("*"))
    for linked in found:
        if linked.is_symlink() and linked.is_dir():  # rglob does not look into it
            raise TpawError(
                f"{linked}: is a symbolic link to a folder; links are not followed. Set the path to the folder itself"
            )
    return [file for file in found if file.is_file()]


def read_hub(data: Data, split: str) -> Source:
    import datasets

    try:
        rows = datasets.load_dataset(data.path, data.dataset_config, split=split)
    except Exception as error:  # the library raises a dozen kinds; all mean the same here
        offline = " HF_HUB_OFFLINE is set: unset it, or use a local file." if os.environ.get("HF_HUB_OFFLINE") else ""
        raise TpawError(
            f"data.path {data.path!r}, split {split!r}: is not a local file or folder, and cannot be loaded from "
            f"the hub.{offline} {_first(error)}"
        ) from None
    name = f"{data.path}[{split}]"
    return Source(name, _numbered(_decoded(rows, name)))


def _numbered(items: Iterable[Any], shard: Path | None = None) -> Iterator[tuple[str, Any]]:
    for number, item in enumerate(items, start=1):
        yield f"{shard}, row {number}" if shard else f"row {number}", item


def _sharded(folder: Path, shards: list[Path]) -> Iterator[tuple[str, Any]]:
    for shard in shards:
        yield from _numbered(read_file(shard), shard.relative_to(folder))


def _saved(folder: Path) -> Iterator[Any]:
    """A data set of `datasets.save_to_disk`."""
    import datasets

    try:
        rows = datasets.load_from_disk(str(folder))
    except Exception as error:  # as above
        raise TpawError(f"{folder}: is not a readable `save_to_disk` dataset. {_first(error)}") from None
    yield from _decoded(rows, str(folder))


def _decoded(rows: Iterable[Any], name: str) -> Iterator[Any]:
    try:
        yield from map(without_nulls, rows)
    except Exception as error:  # a picture or a sound needs packages that are not installed
        raise TpawError(f"{name}: its rows cannot be read. {_first(error)}") from None


def _shards(folder: Path, split: str) -> list[Path]:
    """Every file of a folder in the order of their names, or those of one split. Refuses a file of another format."""
    splits = _splits(folder)
    shards = [path for paths in splits.values() for path in paths]
    if len(splits) > 1:
        named = ", ".join(sorted(name for name in splits if name))
        if None in splits:
            what = (
                f"contains files of the split {named}, and also {splits[None][0].name}, whose name indicates no split"
            )
            raise TpawError(f"{folder}: {what}; move one of them to another folder")
        if split not in splits:
            what = f"has the splits {named}, not {split}"
            raise TpawError(f"{folder}: {what}; set data.train_split and data.heldout_split")
        shards = splits[split]
    for path in shards:
        if not has_format(path):
            raise TpawError(f"{path}: is in an unsupported format (supported: {FORMATS}); move it out of the folder")
    filled = sorted(path for path in shards if path.stat().st_size)  # a writer of many shards leaves some empty
    if not filled:
        raise TpawError(f"{folder}: contains no data files; supported: {FORMATS}")
    return filled


def _splits(folder: Path) -> dict[str | None, list[Path]]:
    """A folder's files by the split in their name or in their folder's: train-0-of-2.pq, my_test.csv, test/0.jsonl."""
    found: dict[str | None, list[Path]] = {}
    for path in files_of(folder):
        name = path.relative_to(folder)
        if not any(BESIDE_SHARDS.match(part) for part in name.parts):
            split = SPLIT.search(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.as_posix()).lower())
            found.setdefault(split and split[1], []).append(path)
    return found


def _first(error: Exception) -> str:
    return f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
