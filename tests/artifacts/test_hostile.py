"""Bytes drawn and bent at random into everything that reads them; `python -m chaos.fuzz` goes on for longer."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chaos import targets
from tpaw_core.errors import TpawError


@st.composite
def bent(draw: st.DrawFn, target: str) -> bytes:
    """A seed of the target with some bytes replaced, taken out or put in; or any bytes."""
    content = bytearray(draw(st.sampled_from([*targets.seeds(target), b""])))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(content)))
        end = draw(st.integers(start, min(len(content), start + 8)))
        content[start:end] = draw(st.binary(max_size=8))
    return bytes(content)


def parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def without_columns() -> bytes:
    """Two rows of no column: pyarrow's own batches end the process."""
    return parquet(pa.table({"prompt": ["a", "b"]}).select([]))


def weights(kind: pa.DataType, row: list[float | None]) -> bytes:
    """A row of weights whose numbers are of this type."""
    numbers = dict.fromkeys(("players_chosen", "players_rejected", "beta"), pa.array([row], kind))
    return parquet(pa.table({"prompt_id": ["0" * 16], "opponent": ["1" * 64], **numbers}))


@pytest.mark.parametrize(
    ("target", "content", "said"),
    [
        (
            "team",
            json.dumps(targets.TEAM | {"members": [targets.MEMBER | {"iteration": math.inf}]}).encode(),
            "is damaged",
        ),
        ("team", json.dumps({k: v for k, v in targets.TEAM.items() if k != "players"}).encode(), "is damaged"),
        ("team", b"[" * 5000, "is damaged"),
        ("manifest", json.dumps(targets.MANIFEST | {"files": ["config.json"]}).encode(), "is damaged"),
        ("manifest", b"[" * 5000, "is damaged"),
        ("parquet", b"PAR1" + bytes([255] * 20) + targets.seeds("parquet")[0][24:], "not a readable"),
        ("parquet", without_columns(), "not a readable"),
        ("answers", targets.seeds("answers")[0].replace(b"0" * 16, b"0" * 11 + b"\xaa" + b"0" * 4), "cannot be read"),
        ("weights", weights(pa.list_(pa.float64()), [-1.0, -2.0]), "one number for each of 2 players"),
        ("weights", weights(pa.list_(pa.float64(), 2), [-1.0, None]), "cannot be read"),
        ("weights", weights(pa.list_(pa.float64(), 2), [-1.0, math.inf]), "not finite"),
        ("params", b"!<tag> seed: 1", "nothing takes"),
        ("params", b"? [seed]\n: 1", "nothing takes"),
        ("params", b"seed: &it [*it]", "valid integer"),
        ("params", b"seed: " + b"[" * 100 + b"]" * 100, "aliases"),
        (
            "params",
            b"a: &a []\n" + b"".join(b"%c: &%c [*%c, *%c]\n" % (c + 1, c + 1, c, c) for c in range(97, 117)),
            "aliases",
        ),
        ("params", b"seed: !!timestamp x", "not valid YAML"),
        ("override", b"seed=[]:", "nothing takes"),
        ("override", b"iterations=['1', '2']", "valid dict"),
        ("override", b"iterations.1=[1]", "valid dict"),
    ],
)
def test_what_was_found_once_is_refused(target: str, content: bytes, said: str, workspace_folder: Path) -> None:
    with pytest.raises(TpawError, match=said):
        targets.TARGETS[target][0](content)


@pytest.mark.parametrize("target", list(targets.TARGETS))
def test_whatever_the_bytes_an_error_is_clear_and_what_is_let_through_is_right(
    target: str, workspace_folder: Path
) -> None:
    @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(bent(target))
    def holds(content: bytes) -> None:
        with suppress(TpawError):
            targets.TARGETS[target][0](content)

    holds()
