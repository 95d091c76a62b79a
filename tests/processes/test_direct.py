"""Addresses on this machine are asked directly; which proxy is used is what urllib, requests and httpx make of it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from urllib.request import proxy_bypass

import pytest

from tpaw_core.processes import direct

NAMES = ("NO_PROXY", "no_proxy")
GIVEN = [
    ({}, "127.0.0.1,localhost"),
    ({"NO_PROXY": "corp.example"}, "corp.example,127.0.0.1,localhost"),
    ({"no_proxy": "corp.example", "NO_PROXY": "other.example"}, "corp.example,127.0.0.1,localhost"),
    ({"NO_PROXY": "*"}, "*"),
]


@pytest.mark.parametrize(("given", "expected"), GIVEN)
def test_this_machine_is_added_to_what_is_reached_without_a_proxy(
    given: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, given.get(name, ""))
    for _ in range(2):
        direct.reach_this_machine()
        assert [os.environ[name] for name in NAMES] == [expected, expected]
    assert all(proxy_bypass(host) for host in ("127.0.0.1", "localhost:5000"))


@pytest.mark.parametrize(("given", "expected"), GIVEN)
def test_prefect_typed_in_an_activated_shell_does_the_same(given: dict[str, str], expected: str, root: Path) -> None:
    """What `make install` adds to the environment's activate, and `make demo` runs."""
    show = ["make", "--no-print-directory", "--eval", 'show: ; @$(DIRECT); echo "$$NO_PROXY $$no_proxy"', "show"]
    kept = {name: value for name, value in os.environ.items() if name not in NAMES}
    done = subprocess.run(show, cwd=root, env={**kept, **given}, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{expected} {expected}"
