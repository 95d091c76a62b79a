"""Rows in: prompts with their target responses, from JSONL, Parquet, CSV, a hub id or the demo's corpus.

Knows rows; must not know tokens (template does) or models.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import operator
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from typing_extensions import TypedDict

from tpaw_core import corpus, records, workspace
from tpaw_core.config import Data, digest
from tpaw_core.errors import TpawError

Message = dict[str, str]
ORIGIN = workspace.DATA / "origin.json"  # what data/ was made from


@dataclass(frozen=True)
class Row:
    prompt_id: str  # digest of prompt and completion
    prompt: list[Message]
    completion: str


@records.shape
class OriginFile(TypedDict):
    """What data/origin.json holds."""

    made_from: str  # digest of settings, seed and source files
    rows: dict[str, int]
    files: dict[str, str]  # name -> SHA-256


class Source(NamedTuple):
    name: str  # for messages
    items: Iterable[Any]


class Unusable(ValueError):
    """One row that cannot be used, and why."""


def prepare(data: Data, seed: int) -> dict[str, int]:
    """Write data/train.jsonl and data/heldout.jsonl from the recipe's source; gives the counts of rows.

    Reads: data.path (and heldout_path). Writes: data/. Refuses: a missing, empty or broken file, more than
    data.max_skipped unusable rows, one prompt in both train and held-out.
    """
    made_from = _origin(data, seed)
    if (counts := _up_to_date(made_from)) is not None:
        return counts
    if data.path == "arithmetic":
        train_count, heldout_count = data.max_train_rows or 4000, data.max_heldout_rows or 1000
        pairs = [
            {"prompt": problem, "completion": answer}
            for problem, answer in corpus.problems(train_count + heldout_count, seed)
        ]
        sources = Source("arithmetic", pairs[:train_count]), Source("arithmetic", pairs[train_count:])
    elif _is_file(data.path):
        if data.heldout_path is None:
            raise TpawError("data.heldout_path: name the file with the held-out rows")
        sources = _file(Path(data.path)), _file(Path(data.heldout_path))
    else:
        sources = _hub(data, data.train_split), _hub(data, data.heldout_split)
    files = {"train": workspace.TRAIN_ROWS, "heldout": workspace.HELDOUT_ROWS}
    if data.validation_rows is not None:
        files["validation"] = workspace.VALIDATION_ROWS
    with ExitStack() as stack:
        aside = {name: stack.enter_context(workspace.publish(path)) for name, path in files.items()}
        prompts: set[bytes] = set()
        counts = {"train": _write(aside["train"], _noted(_usable(sources[0], data, data.max_train_rows), prompts))}
        held = _apart(_usable(sources[1], data, data.max_heldout_rows), prompts, sources[1].name, data.drop_overlap)
        if data.validation_rows is not None:
            counts["validation"] = _write(aside["validation"], islice(held, data.validation_rows))
        counts["heldout"] = _write(aside["heldout"], held)
        if not counts["heldout"]:
            raise TpawError(f"data.validation_rows: {data.validation_rows} leaves none of the held-out rows; lower it")
    if data.validation_rows is None:
        workspace.VALIDATION_ROWS.unlink(missing_ok=True)
    sums = {path.name: workspace.sha256(path) for path in files.values()}
    with workspace.publish(ORIGIN) as origin:
        origin.write_text(json.dumps({"made_from": made_from, "rows": counts, "files": sums}, indent=2) + "\n")
    return counts


def _write(path: Path, rows: Iterable[Row]) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")
            count += 1
    return count


def _origin(data: Data, seed: int) -> str:
    """Digest of all that decides the rows: settings, seed, and the bytes of local files."""
    files = [Path(path) for path in (data.path, data.heldout_path) if path and Path(path).is_file()]
    return digest([data.model_dump(exclude={"max_self_play_rows"}), seed, [workspace.sha256(path) for path in files]])


def _made() -> OriginFile:
    return records.read(ORIGIN, OriginFile, "make data/ again with `tpaw data`")


def _up_to_date(made_from: str) -> dict[str, int] | None:
    """The counts of rows in data/ where they were made from the same and are unchanged."""
    try:
        found = _made()
        same = all(workspace.sha256(workspace.DATA / name) == sha for name, sha in found["files"].items())
        return found["rows"] if same and found["made_from"] == made_from else None
    except (OSError, TpawError):
        return None


def verify() -> None:
    """Raise TpawError where a file in data/ is not as `prepare` made it."""
    if not ORIGIN.exists():
        return
    for name, sha in _made()["files"].items():
        path = workspace.need(workspace.DATA / Path(name).name, "make data/ again with `tpaw data`")
        if workspace.sha256(path) != sha:
            raise TpawError(
                f"{path}: has changed since `tpaw data` made it; run `tpaw data`, and never edit it by hand"
            )


def _prompt_digest(row: Row) -> bytes:
    return hashlib.sha256(json.dumps(row.prompt).encode()).digest()


def _noted(rows: Iterable[Row], prompts: set[bytes]) -> Iterator[Row]:
    for row in rows:
        prompts.add(_prompt_digest(row))
        yield row


def _apart(heldout: Iterable[Row], train: set[bytes], name: str, drop_overlap: bool) -> Iterator[Row]:
    """The held-out rows whose prompt is not in train."""
    first, shared, total = None, 0, 0
    for row in heldout:
        total += 1
        if _prompt_digest(row) not in train:
            yield row
            continue
        shared += 1
        first = first or row
    if first is not None and not drop_overlap:
        raise TpawError(
            f"{name}: {shared} held-out prompts are also in train, the first "
            f"{first.prompt[-1]['content'][:60]!r}; remove them from one of the two, "
            "or set data.drop_overlap=true to leave them out of held-out"
        )
    if shared == total:
        raise TpawError(f"{name}: every held-out prompt is also in train; give other held-out rows")
    if shared:
        print(f"{name}: {shared} of {total} held-out rows left out, as their prompts are in train", flush=True)


def read(path: Path) -> Iterator[Row]:
    """The rows of data/train.jsonl or data/heldout.jsonl, one at a time."""
    workspace.need(path, "make it with `tpaw data`")
    empty = True
    for row in _jsonl(path):
        empty = False
        yield Row(**{k: row[k] for k in ("prompt_id", "prompt", "completion")})
    if empty:
        raise TpawError(f"{path}: holds no rows; make it again with `tpaw data`")


def equal_share(synthetic: Path) -> float | None:
    """The share of answers in synthetic/<t>.parquet that equal their target; None where there is no such file."""
    if not synthetic.exists():
        return None
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(synthetic, columns=["chosen", "rejected"])
    pairs = zip(*(table[name].to_pylist() for name in ("chosen", "rejected")), strict=True)
    return sum(chosen == rejected for chosen, rejected in pairs) / table.num_rows


def _usable(source: Source, data: Data, limit: int | None) -> Iterator[Row]:
    """The distinct usable rows, at most ``limit``."""
    name, total, repeated = source.name, 0, 0
    reasons: list[str] = []
    seen: set[str] = set()
    for number, item in enumerate(source.items, start=1):
        if limit is not None and len(seen) == limit:
            break
        total = number
        try:
            row = _row(_mawps(item) if data.format == "mawps" else item, data)
        except Unusable as reason:
            reasons.append(f"row {number}: {reason}")
            continue
        if row.prompt_id in seen:
            repeated += 1
            continue
        seen.add(row.prompt_id)
        yield row
    if repeated:
        print(f"{name}: {repeated} of {total} rows repeat an earlier row and are left out", flush=True)
    refuse_if_too_many(name, reasons, total, data.max_skipped)
    if not seen:
        raise TpawError(f"{name}: holds no rows; give a file with one row a line")


def refuse_if_too_many(name: str, reasons: list[str], total: int, max_skipped: float) -> None:
    """Report rows that cannot be used; raise where they are more than the share ``max_skipped``."""
    if not reasons:
        return
    summary = f"{name}: {len(reasons)} of {total} rows cannot be used; first: {'; '.join(reasons[:3])}"
    if len(reasons) > max_skipped * total:
        raise TpawError(f"{summary}. Mend the rows, or raise data.max_skipped (now {max_skipped})")
    print(summary, flush=True)


def _row(item: Any, data: Data) -> Row:
    if not isinstance(item, dict):
        raise Unusable(f"is {type(item).__name__}, not an object with named fields")
    if isinstance(item.get("messages"), list):
        *prompt, last = item["messages"] or [None]
        if not prompt or not isinstance(last, dict) or last.get("role") != "assistant":
            raise Unusable("'messages' must hold a prompt and end with the assistant's target")
        completion = last.get("content")
    else:
        for column in (data.prompt_column, data.completion_column):
            if item.get(column) is None:
                raise Unusable(f"has no {column!r}; fields are {', '.join(map(str, item)) or 'none'}")
        prompt, completion = item[data.prompt_column], item[data.completion_column]
        if isinstance(completion, list):
            completion = (
                completion[0].get("content") if len(completion) == 1 and isinstance(completion[0], dict) else None
            )
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
    if not isinstance(completion, str) or not completion.strip():
        raise Unusable("its target is empty")
    if not isinstance(prompt, list) or not all(
        isinstance(m, dict) and isinstance(m.get("content"), str) for m in prompt
    ):
        raise Unusable("its prompt is neither text nor a list of messages with role and content")
    messages = [{"role": str(m.get("role", "user")), "content": m["content"]} for m in prompt]
    if not any(m["content"].strip() for m in messages):
        raise Unusable("its prompt is empty")
    try:
        identity = hashlib.sha256(json.dumps([messages, completion], ensure_ascii=False).encode()).hexdigest()[:16]
    except UnicodeEncodeError:
        raise Unusable("holds a character that is not valid Unicode (a lone surrogate)") from None
    return Row(identity, messages, completion)


def _mawps(item: dict[str, str]) -> dict[str, str]:
    """A MAWPS row: the question with its numbers masked, as it comes; the target is its equation in prefix notation."""
    try:
        question, equation, answer = item["Question"], item["Equation"], float(item["Answer"])
        value = _value(equation.split(), [float(number) for number in item["Numbers"].split()])
    except (KeyError, AttributeError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise Unusable(f"is not a MAWPS row ({type(error).__name__}: {error})") from None
    if not math.isclose(value, answer, rel_tol=1e-2, abs_tol=1e-2):
        raise Unusable(f"its equation {equation!r} gives {value:g}, its answer is {answer:g}")
    return {"prompt": question, "completion": f"#### {equation}"}


def _value(prefix: list[str], numbers: list[float]) -> float:
    """What an equation in prefix notation comes to."""
    apply = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
    stack: list[float] = []
    for token in reversed(prefix):
        if token in apply:
            stack.append(apply[token](stack.pop(), stack.pop()))
        else:
            stack.append(numbers[int(token[6:])] if token.startswith("number") else float(token))
    (value,) = stack
    return value


def _is_file(path: str) -> bool:
    return Path(path).exists() or Path(path).suffix in (".jsonl", ".json", ".parquet", ".csv")


def _file(path: Path) -> Source:
    workspace.need(path, "mend data.path or data.heldout_path, or put the file there")
    if path.stat().st_size == 0:
        raise TpawError(f"{path}: is empty; it needs one row a line")
    read = {".csv": _csv, ".parquet": _parquet}.get(path.suffix, _jsonl)
    return Source(str(path), read(path))


def _csv(path: Path) -> Iterator[Any]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        try:
            yield from rows
        except csv.Error as error:
            raise TpawError(f"{path}: line {rows.reader.line_num} is not CSV ({error})") from None
        except UnicodeDecodeError as error:
            raise TpawError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})") from None


def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        if not file.schema_arrow.names:  # its batches would end the process
            raise ValueError("it has no columns")
        for batch in file.iter_batches(batch_size=1000):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        raise TpawError(f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}") from None


def _jsonl(path: Path) -> Iterator[Any]:
    number = 0
    with path.open(encoding="utf-8") as file:
        try:
            for line in file:
                number += 1
                if line.strip():
                    yield json.loads(line)
        except json.JSONDecodeError as error:
            what = f"line {number} is not JSON ({error.msg})"
            raise TpawError(f"{path}: {what}; each line must be one JSON object") from None
        except UnicodeDecodeError as error:
            raise TpawError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})") from None
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets thousands deep
            raise TpawError(f"{path}: line {number} cannot be read ({str(error).split(';')[0]})") from None


def _hub(data: Data, split: str) -> Source:
    import datasets

    try:
        return Source(f"{data.path}[{split}]", datasets.load_dataset(data.path, data.dataset_config, split=split))
    except Exception as error:  # the library raises a dozen kinds; all mean the same here
        offline = " HF_HUB_OFFLINE is set: unset it, or name a local file." if os.environ.get("HF_HUB_OFFLINE") else ""
        raise TpawError(
            f"data.path {data.path!r}, split {split!r}: cannot be loaded from the hub.{offline} {_first(error)}"
        ) from None


def _first(error: Exception) -> str:
    return f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
