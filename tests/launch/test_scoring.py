"""Scores, log-probabilities and gradients of divided models, beside those of one process."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import ranks
from tests.support.ranks import TWO
from tpaw_core.artifacts.pretrained import Sharding
from tpaw_core.artifacts.score_store import ScoreStore
from tpaw_core.engine import scoring
from tpaw_core.launch import launcher
from tpaw_core.launch import scoring as ranked
from tpaw_core.launch.source import Source

pytestmark = pytest.mark.slow
GROUPS = [(list(group.prompt_ids), [list(group.chosen_ids), *group.rejected_ids]) for group in ranks.make_groups()[:4]]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    home = tmp_path_factory.mktemp("models")
    found = {name: str(ranks.save_model(home / name, tied=name == "tied")) for name in ("tied", "untied")}
    return {**found, "phi": str(ranks.save_phi(home / "phi"))}


@pytest.fixture(scope="module")
def found(places: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    sources = {name: (Source(place), Sharding(2)) for name, place in places.items()}
    for name in ("untied", "phi"):
        sources[f"{name}, policy"] = Source(places[name]), Sharding(2, frozen=False, bfloat16=True)
        sources[f"{name}, bfloat16"] = Source(places[name], dtype="bfloat16"), Sharding(2)
    with launcher.folder(tmp_path_factory.mktemp("home")) as folder:
        for _ in launcher.run(TWO, folder, partial(ranks.probe, sources, GROUPS)):
            pass
        return dict(json.loads((folder / "found.json").read_text()))


@pytest.mark.parametrize("name", ["tied", "untied", "phi"])
def test_a_divided_model_has_the_log_probabilities_and_gradients_of_a_whole_one(
    name: str, places: dict[str, str], found: dict[str, Any]
) -> None:
    expected = ranks.logps_and_gradients(Source(places[name]).load(), GROUPS)
    assert found[name]["logps"] == [pytest.approx(row, rel=1e-6) for row in expected["logps"]]
    for ours, theirs in zip(found[name]["gradients"], expected["gradients"], strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            torch.testing.assert_close(torch.tensor(ours[key]), torch.tensor(value), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["untied", "phi"])
def test_a_policy_that_gathers_bfloat16_equals_bfloat16_weights_bit_for_bit(name: str, found: dict[str, Any]) -> None:
    policy, frozen = found[f"{name}, policy"], found[f"{name}, bfloat16"]
    assert policy["logps"] == frozen["logps"]
    assert policy["dtype"] == frozen["dtype"] == "torch.float32"
    assert policy["logps"] != found[name]["logps"]


def test_all_layers_of_a_pass_share_one_index(found: dict[str, Any]) -> None:
    assert {name: own["built"] for name, own in found.items()} == dict.fromkeys(found, 4)


def test_the_score_store_gets_the_same_files_from_any_number_of_ranks(places: dict[str, str], tmp_path: Path) -> None:
    source = Source(places["tied"])
    pairs = [(prompt, response) for prompt, responses in GROUPS for response in responses]
    pairs += [([7, row % 90 + 2], [row % 50 + 3, 9, 1]) for row in range(200)]
    how: Any = {"pad_id": 0, "bf16": False}
    scorers = {
        "one": lambda new: scoring.batches(source.load(), new, **how),
        "replicated": lambda new: ranked.batches(TWO, tmp_path, source, new, sharded=False, **how),
        "sharded": lambda new: ranked.batches(TWO, tmp_path, source, new, sharded=True, **how),
    }
    files = {}
    for name, scorer in scorers.items():
        ScoreStore(tmp_path / name, "d" * 64, "float32").scores(pairs, scorer)
        files[name] = sorted(path.name for path in (tmp_path / name).rglob("*.npy"))
    assert files["one"]
    assert files["one"] == files["replicated"] == files["sharded"]
