"""Every launch takes some seconds: a run of two processes is made once, and compared in several tests."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import ranks
from tests.support.ranks import TWO
from tpaw_core.artifacts import adapters
from tpaw_core.config.machine import Machine
from tpaw_core.config.params import Lora
from tpaw_core.engine.training import loop
from tpaw_core.errors import Diverged, TpawError, Unavailable
from tpaw_core.launch.source import Source

pytestmark = pytest.mark.slow
ONE = Machine()
Trained = tuple[Any, list[dict[str, float]]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def source(home: Path) -> Source:
    return Source(str(ranks.save_model(home / "tied", tied=True)))


@pytest.fixture(scope="module")
def base(source: Source) -> Source:
    return Source(source.place, dtype="bfloat16", is_base=True, new=(Lora(r=4), 3))


@pytest.fixture(scope="module")
def alone(source: Source, home: Path) -> Trained:
    return ranks.train(ONE, source, home, state="alone")


@pytest.fixture(scope="module")
def sharded(source: Source, home: Path) -> Trained:
    return ranks.train(TWO, source, home, state="sharded", sharded=True)


def assert_same_course(found: Trained, expected: Trained, near: float = 1e-5, *, but: str = "epoch") -> None:
    assert [entry["step"] for entry in found[1]] == [entry["step"] for entry in expected[1]]
    for ours, theirs in zip(found[1], expected[1], strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            if name not in {"epoch", but} and "runtime" not in name and "per_second" not in name:
                assert ours[name] == pytest.approx(value, rel=near, abs=near * 10), name


def digest(model: Any) -> str:
    found = hashlib.sha256()
    for name, value in model.named_parameters():
        if value.device.type != "meta":
            found.update(name.encode() + value.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def test_replicated_training_takes_the_course_of_one_process(source: Source, home: Path, alone: Trained) -> None:
    found = ranks.train(TWO, source, home, state="replicated")
    assert_same_course(found, alone)
    assert digest(found[0]) != digest(source.load())


def test_sharded_training_takes_the_course_of_one_process(alone: Trained, sharded: Trained) -> None:
    assert_same_course(sharded, alone)


def test_sharded_sft_of_an_untied_model_whose_prompts_cannot_be_shared(home: Path) -> None:
    untied = Source(str(ranks.save_nemotron(home / "untied")))
    found, expected = (
        ranks.train(machine, untied, home, loop.sft, f"untied-{machine.processes}", sharded=machine is TWO)
        for machine in (TWO, ONE)
    )
    assert_same_course(found, expected, but="tokens")  # those of padding count


def test_what_was_not_changed_comes_back_with_the_same_bytes(source: Source, home: Path) -> None:
    model, _ = ranks.train(TWO, source, home, state="still", sharded=True, learning_rate=1e-60, num_train_epochs=1)
    whole = source.load()
    for folder, one in ((home / "a", model), (home / "b", whole)):
        one.to(torch.bfloat16).save_pretrained(folder, max_shard_size="10KB")
    files = {path.name: path.read_bytes() for path in (home / "b").iterdir()}
    assert len(files) > 3
    assert {path.name: path.read_bytes() for path in (home / "a").iterdir()} == files


def test_a_killed_rank_ends_all_and_the_next_run_ends_with_the_same_bytes(
    source: Source, home: Path, sharded: Trained
) -> None:
    with pytest.raises(Unavailable, match="a process of 2 was lost"):
        ranks.train(TWO, source, home, ranks.self_play_until_killed, "killed", sharded=True)
    found = ranks.train(TWO, source, home, state="killed", sharded=True)
    assert digest(found[0]) == digest(sharded[0])
    assert [entry["loss"] for entry in found[1]] == [entry["loss"] for entry in sharded[1]]


def test_a_state_is_resumed_by_another_number_of_processes(source: Source, home: Path, alone: Trained) -> None:
    """Of whole weights; not bit for bit, as the rest is summed in another order."""
    with pytest.raises(Unavailable):
        ranks.train(TWO, source, home, ranks.self_play_until_killed, "moved", sharded=False)
    (home / "moved-2").rename(home / "moved-1")
    assert_same_course(ranks.train(ONE, source, home, state="moved"), alone)
    with pytest.raises(Diverged):  # a state of one process, which stopped at the third step
        ranks.train(ONE, source, home, ranks.self_play_until_it_diverges, "back")
    (home / "back-1").rename(home / "back-2")
    assert_same_course(ranks.train(TWO, source, home, state="back"), alone)


def test_a_number_that_is_not_finite_on_one_rank_ends_both_and_names_its_row(source: Source, home: Path) -> None:
    with pytest.raises(Diverged, match="first in the row with prompt_id id-11"):
        ranks.train(TWO, source, home, ranks.self_play_with_a_nan, "nan")


def test_adapters_take_the_course_of_one_process_replicated_and_sharded(base: Source, home: Path) -> None:
    alone = ranks.train(ONE, base, home, state="lora")
    for name, own in (("lora-replicated", {}), ("lora-sharded", {"sharded": True})):
        model, log = ranks.train(TWO, base, home, state=name, **own)
        assert_same_course((model, log), alone, near=1e-2)  # the base computes in bfloat16
        adapters.write(model, home / name)
        written = {path.name: path.stat().st_size for path in (home / name).iterdir()}
        assert written.keys() == {adapters.CONFIG, adapters.WEIGHTS}
        for parameter in (p for n, p in model.named_parameters() if "lora_B" in n):
            assert parameter.any(dim=1).all()


def test_a_tied_embedding_that_cannot_be_divided_equally_is_refused(home: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(ranks, "VOCABULARY", 97)
    odd = Source(str(ranks.save_model(home / "odd", tied=True)))
    with pytest.raises(TpawError, match=re.escape("has 97 rows, and 2 processes cannot divide them equally")):
        ranks.train(TWO, odd, home, state="odd", sharded=True)
