"""Bytes drawn and bent at random into everything that reads them; `python -m chaos.fuzz` goes on for longer."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chaos import targets
from tpaw_core.errors import TpawError

pytestmark = pytest.mark.slow


@st.composite
def bent(draw: st.DrawFn, target: str) -> bytes:
    """A seed of the target with some bytes replaced, removed or inserted; or any bytes."""
    content = bytearray(draw(st.sampled_from([*targets.seeds(target), b""])))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(content)))
        end = draw(st.integers(start, min(len(content), start + 8)))
        content[start:end] = draw(st.binary(max_size=8))
    return bytes(content)


@pytest.mark.parametrize("target", list(targets.TARGETS))
def test_whatever_the_bytes_an_error_is_clear_and_what_is_let_through_is_right(target: str, tmp_path: Path) -> None:
    @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(bent(target))
    def holds(content: bytes) -> None:
        with suppress(TpawError):
            targets.TARGETS[target][0](tmp_path, content)

    holds()
