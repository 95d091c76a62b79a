from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tpaw_core.config.optimisation import Optimisation
from tpaw_core.config.params import Objective
from tpaw_core.engine import packing, scoring
from tpaw_core.engine.training import loop
from tpaw_core.engine.training.batches import Group, prompt_group
from tpaw_core.engine.training.log import OnLog
from tpaw_core.errors import TpawError
from tpaw_core.method.objectives.base import LogProbs, Settings
from tpaw_core.method.objectives.by_name import OBJECTIVES
from tpaw_core.method.objectives.tpaw import tpaw_loss
from tpaw_core.method.player_weights import player_weights

OBJECTIVE = Objective(**{"lambda": 0.1})
Trained = tuple[Any, list[dict[str, float]]]  # the model and the log
Run = Callable[..., Trained]


def settings(**changes: Any) -> Optimisation:
    base = {"learning_rate": 1e-3, "num_train_epochs": 1, "train_batch_size": 4, "warmup_ratio": 0}
    return Optimisation(**{**base, "logging_steps": 1, "save_steps": 2, **changes})


@pytest.fixture(scope="module")
def groups(make_model: Callable[[int], Any], tokenizer: Any, encoded: list[Any]) -> list[Group]:
    """16 prompts, two players, two responses each; players' log-probs and weights are the real ones."""
    players = [make_model(0), make_model(1)]
    made = []
    for number, e in enumerate(encoded[:16]):
        responses = [encoded[(number + shift) % 16].chosen_ids for shift in (1, 2)]
        pairs = [(e.prompt_ids, ids) for ids in (e.chosen_ids, *responses)]
        logps = [scoring.score(player, pairs, pad_id=tokenizer.pad_token_id) for player in players]
        chosen, *rejected = (list(column) for column in zip(*logps, strict=True))
        beta = [player_weights([chosen], [row], gamma=0.5, scale=0.1)[0].tolist() for row in rejected]
        made.append(Group(e.prompt_ids, e.chosen_ids, responses, chosen, rejected, beta))
    return made


@pytest.fixture(scope="module")
def run(
    make_model: Callable[[int], Any], tokenizer: Any, groups: list[Group], tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """Self-play of a new model on the groups; gives the model and the log."""

    def play(
        on_log: OnLog = lambda step, metrics: None,
        state: Path | None = None,
        rows: Any = None,
        policy: int = 0,
        objective: Objective = OBJECTIVE,
        **changes: Any,
    ) -> Trained:
        model = make_model(policy)
        log = loop.self_play(
            model,
            groups if rows is None else rows,
            objective,
            settings(**changes),
            pad_id=tokenizer.pad_token_id,
            seed=5,
            state=state or tmp_path_factory.mktemp("state"),
            on_log=on_log,
        )
        return model, log

    return play


@pytest.fixture(scope="module")
def plain_run(run: Run) -> Trained:
    """One epoch with the settings as they are; nobody changes the model."""
    return run()


@pytest.fixture(scope="module")
def long_run(run: Run) -> Trained:
    """Two epochs, not interrupted; nobody changes the model."""
    return run(num_train_epochs=2)


def log_probs(policy: Any, rows: list[tuple[Group, int]], *, pad_id: int, initial: bool = False) -> LogProbs:
    """What the objective gets for (group, which response) pairs, with the policy's part from scoring."""

    def scores(ids: Callable[[Group, int], Any]) -> torch.Tensor:
        return torch.tensor(scoring.score(policy, [(g.prompt_ids, ids(g, n)) for g, n in rows], pad_id=pad_id))

    rejected = scores(lambda g, n: g.rejected_ids[n])
    return LogProbs(
        scores(lambda g, n: g.chosen_ids),
        rejected,
        scores(lambda g, n: g.initial_ids) if initial else torch.full_like(rejected, torch.nan),
        torch.tensor([g.players_chosen for g, _ in rows]),
        torch.tensor([g.players_rejected[n] for g, n in rows]),
        torch.tensor([g.beta[n] for g, n in rows]),
        torch.tensor([len(g.chosen_ids) for g, _ in rows]),
        torch.tensor([len(g.rejected_ids[n]) for g, n in rows]),
    )


def weights_digest(model: Any) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def untimed(log: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in entry.items() if "runtime" not in k and "per_second" not in k} for entry in log]


def test_the_first_steps_loss_and_metrics_are_the_objectives_on_scored_log_probs(
    run: Run, groups: list[Group], make_model: Callable[[int], Any], tokenizer: Any
) -> None:
    _, log = run(train_batch_size=16)
    logps = log_probs(make_model(0), [(g, n) for g in groups for n in range(2)], pad_id=tokenizer.pad_token_id)
    expected = tpaw_loss(logps, Settings(OBJECTIVE.lambda_, eta=OBJECTIVE.eta))
    first = log[0]
    assert first["step"] == 1
    assert first["loss"] == pytest.approx(expected.loss.mean().item(), rel=1e-4)
    assert first["logps/chosen"] == pytest.approx(logps.policy_chosen.mean().item(), rel=1e-5)
    assert first["logps/rejected"] == pytest.approx(logps.policy_rejected.mean().item(), rel=1e-5)
    assert first["weights/player/1"] == pytest.approx(logps.beta[:, 1].mean().item(), rel=1e-5)
    # Player 0 is the policy itself, so its rewards are zero up to rounding; player 1 is another model.
    assert first["players/0/rewards/chosen"] == pytest.approx(0, abs=1e-4)
    assert first["players/1/rewards/rejected"] == pytest.approx(expected.reward_rejected[:, 1].mean().item(), abs=1e-4)
    reward = (logps.beta * expected.reward_chosen).sum(-1).mean().item()
    assert first["rewards/chosen"] == pytest.approx(reward, abs=1e-4)
    margins = first["rewards/chosen"] - first["rewards/rejected"]
    assert first["rewards/margins"] == pytest.approx(margins, abs=1e-6)


def test_self_play_widens_the_margin(run: Run) -> None:
    _, log = run(num_train_epochs=4)
    assert log[-1]["rewards/margins"] > log[0]["rewards/margins"] + 0.5


@pytest.mark.parametrize(
    "responses",
    [
        pytest.param([2] * 8, marks=pytest.mark.slow, id="two responses each"),
        pytest.param([1, 2] * 4, id="one or two responses"),
        pytest.param([2] * 12, marks=pytest.mark.slow, id="a last batch that is not full"),
    ],
)
def test_eight_batches_of_one_make_the_same_step_as_one_batch_of_eight(
    responses: list[int], run: Run, groups: list[Group], make_model: Callable[[int], Any]
) -> None:
    """A few SGD steps, linear in the gradient; the policy is no player, so no reward is zero up to its rounding."""
    rows = [
        g._replace(rejected_ids=g.rejected_ids[:n], players_rejected=g.players_rejected[:n], beta=g.beta[:n])
        for g, n in zip(groups, responses, strict=False)
    ]
    plain = {
        "rows": rows,
        "policy": 2,
        "optim": "sgd",
        "learning_rate": 1e-4,
        "num_train_epochs": 3,
        "max_grad_norm": 0,
    }
    one, log_one = run(train_batch_size=8, **plain)
    eight, log_eight = run(train_batch_size=8, max_tokens=1, **plain)
    assert len(log_one) == len(log_eight) == 3 * math.ceil(len(rows) / 8)
    for name in ("loss", "grad_norm"):
        assert [e[name] for e in log_eight] == pytest.approx([e[name] for e in log_one], rel=1e-4), name
    pairs = list(zip(make_model(2).parameters(), one.parameters(), eight.parameters(), strict=True))
    for _, a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert max((a - start).abs().max().item() for start, a, _ in pairs) > 1e-4


def test_at_the_first_step_all_targets_weigh_eta_against_the_checkpoint_that_is_trained(
    run: Run, groups: list[Group]
) -> None:
    """P_{t-1} = 0 exactly, the "<=" side; scoring and training must not fall on both sides of it by rounding."""
    newest = [
        g._replace(
            players_chosen=g.players_chosen[:1],
            players_rejected=[row[:1] for row in g.players_rejected],
            beta=[[1.0] for _ in g.beta],
        )
        for g in groups
    ]
    _, log = run(rows=newest, train_batch_size=16)
    assert log[0]["weights/target_active"] == 1.0


@pytest.mark.parametrize(
    ("stop", "saved"),
    [
        pytest.param(1, None, marks=pytest.mark.slow),
        (2, None),
        pytest.param(3, 2, marks=pytest.mark.slow),
        (6, 4),
    ],
)
def test_a_resumed_run_ends_where_an_uninterrupted_one_does_byte_for_byte(
    stop: int,
    saved: int | None,
    run: Run,
    long_run: Trained,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def interrupt(step: int, metrics: dict[str, float]) -> None:
        if step == stop:
            raise KeyboardInterrupt

    expected, expected_log = long_run
    with pytest.raises(KeyboardInterrupt):
        run(interrupt, tmp_path / "state", num_train_epochs=2)
    sent: dict[int, dict[str, float]] = {}
    found, log = run(sent.__setitem__, tmp_path / "state", num_train_epochs=2)
    resumed = re.findall(r"resuming from .*/checkpoint-(\d+)", caplog.text)
    assert resumed == ([] if saved is None else [str(saved)])
    assert weights_digest(found) == weights_digest(expected)
    assert untimed(log) == untimed(expected_log)
    assert list(sent) == list(range(1, 9))


def test_a_truncated_state_is_skipped(run: Run, tmp_path: Path) -> None:
    state = tmp_path / "state"
    expected, _ = run(state=state)
    broken = state / "checkpoint-99"
    broken.mkdir()
    (broken / "trainer_state.json").write_text('{"global_step": 9')
    found, _ = run(state=state)
    assert weights_digest(found) == weights_digest(expected)


def test_equal_inputs_give_equal_bytes(run: Run, plain_run: Trained) -> None:
    (one, log), (other, same_log) = plain_run, run()
    assert weights_digest(one) == weights_digest(other)
    assert untimed(log) == untimed(same_log)


def test_a_batch_cut_into_parts_makes_the_same_step(run: Run, groups: list[Group]) -> None:
    plain = {"policy": 2, "optim": "sgd", "learning_rate": 1e-4, "train_batch_size": 16, "max_grad_norm": 0}
    size = max(packing.tokens(prompt_group(group)) for group in groups)
    (whole, log), (parts, log_parts) = run(**plain, max_tokens=100_000), run(**plain, max_tokens=2 * size)
    for name in ("loss", "grad_norm", "rewards/margins", "weights/target_active", "logps/chosen"):
        assert [e[name] for e in log_parts] == pytest.approx([e[name] for e in log], rel=1e-4), name
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_bfloat16_products_train_as_float32_ones_do_but_for_rounding(run: Run) -> None:
    (exact, log), (rounded, log_rounded) = run(policy=2), run(policy=2, bf16=True)
    assert weights_digest(rounded) != weights_digest(exact)
    for name in ("loss", "rewards/margins", "logps/chosen", "grad_norm"):
        assert [e[name] for e in log_rounded] == pytest.approx([e[name] for e in log], rel=0.05, abs=0.05), name
    assert {parameter.dtype for parameter in rounded.parameters()} == {torch.float32}


@pytest.mark.parametrize(("field", "row"), [("players_chosen", 0), ("players_chosen", 5), ("beta", 11)])
def test_a_number_that_is_not_finite_stops_training_and_leaves_the_last_good_state(
    field: str, row: int, run: Run, groups: list[Group], tmp_path: Path
) -> None:
    def poison(item: Any) -> Any:
        return [poison(part) for part in item] if isinstance(item, list) else float("nan")

    rows = [g._replace(row=i, **({field: poison(getattr(g, field))} if i == row else {})) for i, g in enumerate(groups)]
    seen: list[int] = []
    with pytest.raises(
        TpawError, match=rf"loss.* not finite \(seen at step \d+, first in row {row + 1}\); lower the"
    ) as caught:
        run(lambda step, metrics: seen.append(step), tmp_path / "state", rows, save_steps=1)
    bad = int(re.search(r"step (\d+)", str(caught.value))[1])
    assert seen == list(range(1, bad))
    assert [path.name for path in (tmp_path / "state").glob("*")] == [f"checkpoint-{bad - 1}"] * (bad > 1)


def test_sft_lowers_the_loss_of_its_rows(
    make_model: Callable[[int], Any], encoded: list[Any], tokenizer: Any, tmp_path: Path
) -> None:
    model, pad_id = make_model(0), tokenizer.pad_token_id
    pairs = [(e.prompt_ids, e.chosen_ids) for e in encoded[:8]]
    before = sum(scoring.score(model, pairs, pad_id=pad_id))
    tokens = sum(len(response) for _, response in pairs)
    log = loop.sft(
        model,
        pairs,
        settings(train_batch_size=8, num_train_epochs=6, learning_rate=3e-3),
        pad_id=pad_id,
        seed=0,
        state=tmp_path,
        on_log=lambda step, metrics: None,
    )
    assert log[0]["loss"] == pytest.approx(-before / tokens, rel=1e-4)
    assert sum(scoring.score(model.eval(), pairs, pad_id=pad_id)) > before + tokens
    assert log[-1]["loss"] < log[0]["loss"] - 1


def one_player(groups: list[Group]) -> list[Group]:
    """The newest of the two players, with checkpoint 0's answer beside the response."""
    return [
        g._replace(
            rejected_ids=g.rejected_ids[:1],
            players_chosen=g.players_chosen[:1],
            players_rejected=[g.players_rejected[0][:1]],
            beta=[[1.0]],
            initial_ids=g.rejected_ids[1],
        )
        for g in groups
    ]


@pytest.mark.parametrize("name", ["spin", "dpo_nll", "space", "tspin"])
def test_each_objective_trains_on_its_own_loss(
    name: str, run: Run, groups: list[Group], make_model: Callable[[int], Any], tokenizer: Any
) -> None:
    rows = one_player(groups)
    own = Objective(**{"name": name, "lambda": 0.1})
    _, log = run(rows=rows, objective=own, train_batch_size=16, policy=1)
    logps = log_probs(make_model(1), [(g, 0) for g in rows], pad_id=tokenizer.pad_token_id, initial=True)
    expected = OBJECTIVES[name](logps, Settings(0.1, history=0.1))
    assert log[0]["loss"] == pytest.approx(expected.loss.mean().item(), rel=1e-4)
    assert log[0]["rewards/chosen"] == pytest.approx(expected.reward_chosen.mean().item(), rel=1e-3)


def test_lambda_by_length_weighs_a_token_alike_in_targets_and_answers(
    run: Run, groups: list[Group], make_model: Callable[[int], Any], tokenizer: Any
) -> None:
    """With texts of one length it is plain TPAW; otherwise log-probabilities are means a token, times one length."""
    own = Objective(**{"lambda": 0.1, "per_token": True})
    same = [g._replace(rejected_ids=[g.chosen_ids[::-1], [5] * len(g.chosen_ids)]) for g in groups]
    length = len(groups[0].chosen_ids)
    same = [g._replace(chosen_ids=g.chosen_ids[:5], rejected_ids=[r[:5] for r in g.rejected_ids]) for g in same]
    assert length > 5
    (_, plain), (_, by_token) = run(rows=same), run(rows=same, objective=own)
    assert [entry["loss"] for entry in by_token] == pytest.approx([entry["loss"] for entry in plain], rel=1e-6)
    _, log = run(objective=own, train_batch_size=16, policy=1)
    mean = sum(len(g.chosen_ids) for g in groups) / len(groups)
    plain_logps = log_probs(make_model(1), [(g, n) for g in groups for n in range(2)], pad_id=tokenizer.pad_token_id)
    by_chosen, by_rejected = mean / plain_logps.chosen_tokens, mean / plain_logps.rejected_tokens
    expected = tpaw_loss(
        plain_logps._replace(
            policy_chosen=plain_logps.policy_chosen * by_chosen,
            policy_rejected=plain_logps.policy_rejected * by_rejected,
            players_chosen=plain_logps.players_chosen * by_chosen[:, None],
            players_rejected=plain_logps.players_rejected * by_rejected[:, None],
        ),
        Settings(0.1, eta=6.0),
    )
    assert log[0]["loss"] == pytest.approx(expected.loss.mean().item(), rel=1e-4)


def test_the_log_counts_the_tokens_that_were_computed(plain_run: Trained, groups: list[Group]) -> None:
    _, log = plain_run
    in_all = sum(packing.pack([prompt_group(g)]).inputs["input_ids"].numel() for g in groups)
    assert log[-1]["tokens"] == in_all
    assert [entry["tokens"] for entry in log] == sorted(entry["tokens"] for entry in log)


def test_a_model_is_trained_in_bfloat16_as_often_as_it_is_asked(
    make_model: Callable[[int], Any], tokenizer: Any, encoded: list[Any], tmp_path: Path
) -> None:
    """Accelerate marks a model that it has prepared, and would not wrap it again."""

    def train(model: Any, state: str) -> str:
        loop.sft(
            model,
            [(e.prompt_ids, e.chosen_ids) for e in encoded[:4]],
            settings(bf16=True),
            pad_id=tokenizer.pad_token_id,
            seed=5,
            state=tmp_path / state,
            on_log=lambda step, metrics: None,
        )
        return weights_digest(model)

    again, fresh = make_model(0), make_model(0)
    train(again, "first")
    fresh.load_state_dict(again.state_dict())
    assert train(again, "again") == train(fresh, "fresh")
