"""The benchmarks run: those for an accelerator on this processor, at a shape that takes seconds."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from bench import ratio
from bench.__main__ import GPU


def main(name: str, *options: str) -> None:
    sys.argv = [f"bench.{name}", "--shape", "tiny", *options]
    importlib.import_module(f"bench.{name}").main()


def test_all_benchmarks_for_an_accelerator_are_run_here() -> None:
    assert sorted(line.split()[0] for line in GPU) == ["equality", "flops", "scoring", "training"]


def test_equality_writes_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(ratio, "RESULTS", tmp_path)
    main("equality")
    assert [json.loads(path.read_text())["processor"] for path in tmp_path.iterdir()]


@pytest.mark.parametrize("name", ["training", "scoring"])
@pytest.mark.parametrize("side", ["ours", "pairs"])
@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_both_sides_can_be_measured(
    name: str, side: str, dtype: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [])
    main(name, "--dtype", dtype, "--peer", "pairs", "--side", side)
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["triplets_per_second"] > 0
    assert figures["memory"] > 0


def test_the_rate_of_operations_can_be_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [])
    main("flops", "--side", "ours")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["tflops"] > 0
