from __future__ import annotations

import io
import logging
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tpaw_core.artifacts import score_store
from tpaw_core.artifacts.score_store import ScoreStore
from tpaw_core.data.tokens import Pair, TokenRows
from tpaw_core.engine import scoring
from tpaw_core.errors import TpawError
from tpaw_core.method import team

DIGEST = "a" * 64


Batches = Iterator[tuple[list[int], list[float]]]


class Scorer:
    """Scores with a formula, one pair at a time and the last one first; remembers what it was asked."""

    def __init__(self, at_most: int = 1000) -> None:
        self.asked: list[list[Pair]] = []
        self.at_most = at_most

    def __call__(self, pairs: Sequence[Pair]) -> Batches:
        self.asked.append(list(pairs))
        for number, position in enumerate(reversed(range(len(pairs)))):
            if number == self.at_most:
                raise RuntimeError("no memory")
            prompt, response = pairs[position]
            yield [position], [-sum(prompt) - 0.1 * sum(response)]


def always(value: float) -> Callable[[Sequence[Pair]], Batches]:
    return lambda pairs: iter([(list(range(len(pairs))), [value] * len(pairs))])


def never(pairs: Sequence[Pair]) -> Batches:
    raise AssertionError(f"asked again for {list(pairs)}")


def scores(
    folder: Path, pairs: list[Pair], score: Any, after: Sequence[list[Pair]] = (), **settings: str
) -> tuple[list[float], int]:
    """From the store as it lies on the disk, after requests that it must know."""
    given = {"digest": DIGEST, "settings": "float32", **settings}
    store = ScoreStore(folder, given["digest"], given["settings"])
    for earlier in after:
        store.scores(earlier, never)
    values, new = store.scores(pairs, score)
    return values.tolist(), new


def test_each_pair_is_computed_once_also_after_reopening(tmp_path: Path) -> None:
    scorer = Scorer()
    first: list[Pair] = [([1], [2]), ([3], [4]), ([1], [2])]
    second: list[Pair] = [([5], [6]), ([1], [2])]
    assert scores(tmp_path, first, scorer) == ([-1.2, -3.4, -1.2], 2)
    assert scores(tmp_path, first, scorer) == ([-1.2, -3.4, -1.2], 0)
    assert scores(tmp_path, second, scorer, after=[first]) == ([-5.6, -1.2], 1)
    assert scores(tmp_path, second, scorer, after=[first]) == ([-5.6, -1.2], 0)
    assert scores(tmp_path, [([5], [6]), ([3], [4])], scorer, after=[first, second]) == ([-5.6, -3.4], 0)
    assert scorer.asked == [[([1], [2]), ([3], [4])], [([5], [6])]]


def test_equal_requests_give_equal_bytes_whatever_was_asked_before(
    make_model: Callable[[int], Any], tokenizer: Any, encoded: list[Any], tmp_path: Path
) -> None:
    """Also where the first request's file was lost: its rows are computed together, as they were then."""
    model = make_model(0)
    rows: list[Pair] = [(e.prompt_ids, e.chosen_ids) for e in encoded]
    first, second, other = rows[:9], rows[5:20], rows[2:16]

    def score(pairs: Sequence[Pair]) -> Batches:
        return scoring.batches(model, pairs, pad_id=tokenizer.pad_token_id, batch_tokens=400)

    def both(folder: Path) -> bytes:
        store = ScoreStore(folder, DIGEST, "float32")
        return b"".join(store.scores(request, score)[0].tobytes() for request in (first, second))

    expected = both(tmp_path / "clean")
    ScoreStore(tmp_path / "full", DIGEST, "float32").scores(other, score)
    ScoreStore(tmp_path / "full", DIGEST, "float32").scores(second, score)
    assert both(tmp_path / "full") == expected
    for file in (tmp_path / "clean").rglob("*.npy"):
        kept = file.read_bytes()
        file.unlink()
        assert both(tmp_path / "clean") == expected
        assert file.read_bytes() == kept


@pytest.mark.parametrize(
    ("one", "other"), [(([1, 2], [3]), ([1], [2, 3])), (([1], []), ([], [1])), (([1], [2]), ([2], [1]))]
)
def test_rows_with_the_same_ids_in_other_places_are_not_confused(one: Pair, other: Pair, tmp_path: Path) -> None:
    assert scores(tmp_path, [one, other], lambda pairs: iter([([0, 1], [-1.0, -2.0])])) == ([-1.0, -2.0], 2)


def test_ids_are_what_counts_not_what_holds_them(tmp_path: Path) -> None:
    scores(tmp_path, [([1, 2], [70000])], always(-1.0))
    rows = TokenRows([[1, 2], [70000]])
    assert scores(tmp_path, [(rows[0], rows[1])], always(-2.0)) == ([-1.0], 0)


def test_a_key_that_ends_in_zero_bytes_is_found_again(tmp_path: Path) -> None:
    pairs: list[Pair] = next([([n], [1])] for n in range(100_000) if score_store.key(([n], [1])).endswith(b"\0"))
    first = [*pairs, ([1], [2])]
    scores(tmp_path, first, Scorer())
    assert scores(tmp_path, pairs, never, after=[first]) == ([-pairs[0][0][0] - 0.1], 0)


@pytest.mark.parametrize(("digest", "settings"), [("b" * 64, "float32"), (DIGEST, "bfloat16")])
def test_another_checkpoint_or_setting_has_its_own_scores(digest: str, settings: str, tmp_path: Path) -> None:
    scores(tmp_path, [([1], [2])], always(-1.0))
    assert scores(tmp_path, [([1], [2])], always(-2.0), digest=digest, settings=settings) == ([-2.0], 1)
    assert scores(tmp_path, [([1], [2])], always(-3.0)) == ([-1.0], 0)


def test_scores_come_back_exactly_as_they_were_computed(tmp_path: Path) -> None:
    value = -1 / 3 - 1e-12
    scores(tmp_path, [([1], [2])], always(value))
    assert scores(tmp_path, [([1], [2])], always(0.0))[0] == [value]


def test_a_file_with_any_byte_cut_or_changed_is_named_and_computed_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pairs: list[Pair] = [([1], [2]), ([3], [4])]
    scores(tmp_path, pairs, Scorer())
    (file,) = tmp_path.rglob("*.npy")
    whole = file.read_bytes()
    flipped = [whole[:n] + bytes([whole[n] ^ 1]) + whole[n + 1 :] for n in range(len(whole))]
    for damage in [*(whole[:n] for n in range(len(whole))), *flipped, whole + b"\0"]:
        file.write_bytes(damage)
        with pytest.raises(TpawError, match=f"{file}: is damaged .*scored again"):
            score_store.read(file)
        assert scores(tmp_path, pairs, Scorer()) == ([-1.2, -3.4], 2)
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert record.getMessage().startswith(f"{file}: is damaged")
        caplog.clear()
        assert file.read_bytes() == whole


@pytest.mark.parametrize("dtype", ["<f8", "S16", [("key", "S16"), ("logp", "<f4")]])
def test_a_file_of_something_else_that_is_named_for_its_bytes_is_refused(tmp_path: Path, dtype: Any) -> None:
    content = io.BytesIO()
    np.save(content, np.zeros(3, dtype))
    file = tmp_path / f"{score_store.name(content.getvalue())}.npy"
    file.write_bytes(content.getvalue())
    with pytest.raises(TpawError, match="it does not hold scores"):
        score_store.read(file)


def test_a_missing_file_costs_its_own_rows_and_no_others(tmp_path: Path) -> None:
    requests: list[list[Pair]] = [[([n], [1])] for n in range(3)]

    def ask() -> list[int]:
        store = ScoreStore(tmp_path, DIGEST, "float32")
        return [store.scores(request, Scorer())[1] for request in requests]

    assert ask() == [1, 1, 1]
    assert ask() == [0, 0, 0]
    next(tmp_path.rglob("*.npy")).unlink()
    assert sorted(ask()) == [0, 0, 1]


def test_a_scorer_that_fails_keeps_the_files_that_were_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_store, "ENTRIES_PER_FILE", 4)
    pairs: list[Pair] = [([n], [1]) for n in range(12)]
    with pytest.raises(RuntimeError):
        scores(tmp_path, pairs, Scorer(at_most=10))
    assert len(list(tmp_path.rglob("*"))) == 3 + 2, "three folders, two files, nothing half written"
    found, new = scores(tmp_path, pairs, Scorer())
    assert (found, new) == ([-n - 0.1 for n in range(12)], 4)


def test_a_writer_killed_anywhere_leaves_whole_files_only(tmp_path: Path) -> None:
    """A process adds files of four scores until it is killed; the next one continues."""
    code = (
        "import sys, pathlib; from tpaw_core.artifacts import score_store; score_store.ENTRIES_PER_FILE = 4\n"
        f"store = score_store.ScoreStore(pathlib.Path(sys.argv[1]), {DIGEST!r}, 'float32')\n"
        "store.scores([([n], [1]) for n in range(20000)], lambda p: (([n], [-float(n)]) for n in range(len(p))))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    while len(list(tmp_path.rglob("*.npy"))) < 50:
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.005)
    process.kill()
    process.wait()
    pairs: list[Pair] = [([n], [1]) for n in range(20000)]
    found, new = scores(tmp_path, pairs, lambda p: iter([(list(range(len(p))), [-float(q[0][0]) for q in p])]))
    assert found == [-float(n) for n in range(20000)]
    assert 0 < new <= 20000 - 200


def test_many_files_are_read_in_time_that_grows_with_what_they_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not with their number times what is asked: the store of a million rows has hundreds of files."""
    monkeypatch.setattr(score_store, "ENTRIES_PER_FILE", 100)
    looked = 0

    search = np.searchsorted

    def counting(sorted_keys: Any, keys: Any) -> Any:
        nonlocal looked
        looked += len(keys)
        return search(sorted_keys, keys)

    monkeypatch.setattr(np, "searchsorted", counting)
    pairs: list[Pair] = [([n], [1]) for n in range(5000)]
    scores(tmp_path, pairs, lambda p: (([n], [-float(n)]) for n in range(len(p))))
    assert len(list(tmp_path.rglob("*.npy"))) == 50
    looked = 0
    assert scores(tmp_path, pairs, never)[0] == [-float(n) for n in range(5000)]
    assert looked == 5000


def test_two_writers_at_once_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second begins and ends while the first one is at work on the same request."""
    monkeypatch.setattr(score_store, "ENTRIES_PER_FILE", 2)
    pairs: list[Pair] = [([n], [1]) for n in range(6)]

    def interrupted(asked: Sequence[Pair]) -> Batches:
        for number, batch in enumerate(Scorer()(asked)):
            if number == 3:
                assert scores(tmp_path, pairs, Scorer()) == ([-n - 0.1 for n in range(6)], 4)
            yield batch

    assert scores(tmp_path, pairs, interrupted) == ([-n - 0.1 for n in range(6)], 6)
    assert scores(tmp_path, pairs, never) == ([-n - 0.1 for n in range(6)], 0)


def test_over_four_iterations_of_a_team_of_three_no_pair_is_scored_twice(
    make_model: Callable[[int], Any], tokenizer: Any, encoded: list[Any], tmp_path: Path
) -> None:
    rows = encoded[:5]
    models = [make_model(seed) for seed in range(4)]
    candidates = [team.Candidate(t, version=t + 1, digest=64 * f"{t}") for t in range(4)]
    targets = [(e.prompt_ids, e.chosen_ids) for e in rows]
    # The response that checkpoint t gave to row i: token ids that no other has.
    synthetic = {t: [(e.prompt_ids, [10 * t + i + 20, 50 + t]) for i, e in enumerate(rows)] for t in range(4)}
    computed: Counter[tuple[int, tuple[int, ...], tuple[int, ...]]] = Counter()
    stores = {candidate.digest: ScoreStore(tmp_path, candidate.digest, "float32") for candidate in candidates}
    new = []
    for iteration in range(1, 5):
        members = team.assemble(candidates, iteration=iteration, size=3)
        pairs = targets + [pair for member in members for pair in synthetic[member.iteration]]
        fresh = 0
        for member in members:

            def score(asked: Sequence[Pair], player: int = member.iteration) -> Batches:
                computed.update((player, tuple(prompt), tuple(response)) for prompt, response in asked)
                return scoring.batches(models[player], asked, pad_id=tokenizer.pad_token_id, batch_tokens=400)

            found, count = stores[member.digest].scores(pairs, score)
            fresh += count
            direct = scoring.score(models[member.iteration], pairs, pad_id=tokenizer.pad_token_id)
            assert found == pytest.approx(direct, abs=1e-4)
        new.append(fresh)
    assert set(computed.values()) == {1}
    # Blocks of rows that are new. Iteration 1: 1 target, 1 response. 2: the new player's target and 2 responses, the
    # old player on the new response. 3 (and, with a team of three, 4): the new player's target and 3 responses, the two
    # old players on the new response.
    assert new == [blocks * len(rows) for blocks in (2, 4, 6, 6)]
