from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tpaw_core.config.params import Objective, Optimisation
from tpaw_core.engine import packing, scoring
from tpaw_core.engine.training import loop
from tpaw_core.engine.training.batches import Group, Groups, tree, triplets
from tpaw_core.engine.training.log import OnLog
from tpaw_core.errors import TpawError
from tpaw_core.method.objectives.dpo_nll import dpo_nll_loss
from tpaw_core.method.objectives.space import space_loss
from tpaw_core.method.objectives.spin import spin_loss
from tpaw_core.method.objectives.tpaw import tpaw_loss
from tpaw_core.method.objectives.tspin import tspin_loss
from tpaw_core.method.player_weights import player_weights

OBJECTIVE = Objective(**{"lambda": 0.1})
Run = Callable[..., tuple[Any, list[dict[str, float]]]]


def settings(**changes: Any) -> Optimisation:
    base = {"learning_rate": 1e-3, "num_train_epochs": 1, "per_device_train_batch_size": 4, "warmup_ratio": 0}
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


@pytest.fixture
def run(make_model: Callable[[int], Any], tokenizer: Any, groups: list[Group], tmp_path: Path) -> Run:
    """Self-play of a new model on the groups; gives the model and the log."""
    numbers: Iterator[int] = iter(range(100))

    def play(
        on_log: OnLog = lambda step, metrics: None,
        state: Path | None = None,
        rows: Any = None,
        policy: int = 0,
        objective: Objective = OBJECTIVE,
        **changes: Any,
    ) -> tuple[Any, list[dict[str, float]]]:
        model = make_model(policy)
        log = loop.self_play(
            model,
            groups if rows is None else rows,
            objective,
            settings(**changes),
            pad_id=tokenizer.pad_token_id,
            seed=5,
            state=state or tmp_path / str(next(numbers)),
            on_log=on_log,
        )
        return model, log

    return play


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
    _, log = run(per_device_train_batch_size=16)
    policy, pad_id = make_model(0), tokenizer.pad_token_id
    triplets = [(g, n) for g in groups for n in range(2)]
    chosen = torch.tensor(scoring.score(policy, [(g.prompt_ids, g.chosen_ids) for g, _ in triplets], pad_id=pad_id))
    rejected = torch.tensor(
        scoring.score(policy, [(g.prompt_ids, g.rejected_ids[n]) for g, n in triplets], pad_id=pad_id)
    )
    expected = tpaw_loss(
        chosen,
        rejected,
        torch.tensor([g.players_chosen for g, _ in triplets]),
        torch.tensor([g.players_rejected[n] for g, n in triplets]),
        torch.tensor([g.beta[n] for g, n in triplets]),
        scale=OBJECTIVE.lambda_,
        eta=OBJECTIVE.eta,
    )
    beta = torch.tensor([g.beta[n] for g, n in triplets])
    first = log[0]
    assert first["step"] == 1
    assert first["loss"] == pytest.approx(expected.loss.mean().item(), rel=1e-4)
    assert first["logps/chosen"] == pytest.approx(chosen.mean().item(), rel=1e-5)
    assert first["logps/rejected"] == pytest.approx(rejected.mean().item(), rel=1e-5)
    assert first["weights/player/1"] == pytest.approx(beta[:, 1].mean().item(), rel=1e-5)
    # Player 0 is the policy itself, so its rewards are zero up to rounding; player 1 is another model.
    assert first["players/0/rewards/chosen"] == pytest.approx(0, abs=1e-4)
    assert first["players/1/rewards/rejected"] == pytest.approx(expected.reward_rejected[:, 1].mean().item(), abs=1e-4)
    reward = (beta * expected.reward_chosen).sum(-1).mean().item()
    assert first["rewards/chosen"] == pytest.approx(reward, abs=1e-4)
    margins = first["rewards/chosen"] - first["rewards/rejected"]
    assert first["rewards/margins"] == pytest.approx(margins, abs=1e-6)


def test_self_play_widens_the_margin(run: Run) -> None:
    _, log = run(num_train_epochs=4)
    assert log[-1]["rewards/margins"] > log[0]["rewards/margins"] + 0.5


@pytest.mark.parametrize(
    "responses",
    [[2] * 8, [1, 2] * 4, [2] * 12],
    ids=["two responses each", "one or two responses", "a last batch that is not full"],
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
    one, log_one = run(per_device_train_batch_size=8, **plain)
    eight, log_eight = run(per_device_train_batch_size=1, gradient_accumulation_steps=8, **plain)
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
    _, log = run(rows=newest, per_device_train_batch_size=16)
    assert log[0]["weights/target_active"] == 1.0


@pytest.mark.parametrize(("stop", "saved"), [(1, None), (2, None), (3, 2), (6, 4)])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does_byte_for_byte(
    stop: int, saved: int | None, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(step: int, metrics: dict[str, float]) -> None:
        if step == stop:
            raise KeyboardInterrupt

    expected, expected_log = run(num_train_epochs=2)
    with pytest.raises(KeyboardInterrupt):
        run(interrupt, tmp_path / "state", num_train_epochs=2)
    sent: dict[int, dict[str, float]] = {}
    found, log = run(sent.__setitem__, tmp_path / "state", num_train_epochs=2)
    resumed = re.findall(r"resuming from .*/checkpoint-(\d+)", capsys.readouterr().out)
    assert resumed == ([] if saved is None else [str(saved)])
    assert weights_digest(found) == weights_digest(expected)
    assert untimed(log) == untimed(expected_log)
    assert list(sent) == list(range(1, 9))


def test_a_state_that_was_cut_short_is_passed_over(run: Run, tmp_path: Path) -> None:
    state = tmp_path / "state"
    expected, _ = run(state=state)
    broken = state / "checkpoint-99"
    broken.mkdir()
    (broken / "trainer_state.json").write_text('{"global_step": 9')
    found, _ = run(state=state)
    assert weights_digest(found) == weights_digest(expected)


def test_equal_inputs_give_equal_bytes(run: Run) -> None:
    (one, log), (other, same_log) = run(), run()
    assert weights_digest(one) == weights_digest(other)
    assert untimed(log) == untimed(same_log)


def test_a_batch_cut_into_parts_makes_the_same_step(run: Run, groups: list[Group]) -> None:
    plain = {"policy": 2, "optim": "sgd", "learning_rate": 1e-4, "per_device_train_batch_size": 16, "max_grad_norm": 0}
    size = max(packing.tokens(tree(group)) for group in groups)
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
    with pytest.raises(TpawError, match=rf"loss.* not finite by step \d+, first in row {row + 1}; lower the") as caught:
        run(lambda step, metrics: seen.append(step), tmp_path / "state", rows, save_steps=1)
    bad = int(re.search(r"step (\d+)", str(caught.value))[1])
    assert seen == list(range(1, bad))
    assert [path.name for path in (tmp_path / "state").glob("*")] == [f"checkpoint-{bad - 1}"] * (bad > 1)


def test_each_distinct_response_of_a_prompt_is_computed_once() -> None:
    first = Group([1, 2], [3], [[4, 5], [3], [4, 5]], [-1.0], [[-2.0], [-1.0], [-2.0]], [[1.0]] * 3)
    second = Group([6], [3], [[4, 5]], [-3.0], [[-4.0]], [[1.0]])
    part = triplets([first, second], packing.pack, of=5)
    assert part.pack.responses == 4
    assert part.pack.inputs["input_ids"].tolist() == [[1, 2, 6, 4, 4]]
    assert part.pack.target.tolist() == [3, 4, 5, 3, 4, 5]
    assert part.chosen.tolist() == [0, 0, 0, 2]
    assert part.rejected.tolist() == [1, 0, 1, 3]
    assert part.players_chosen.tolist() == [[-1.0], [-1.0], [-1.0], [-3.0]]
    assert part.players_rejected.tolist() == [[-2.0], [-1.0], [-2.0], [-4.0]]
    assert part.groups == 5


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
        settings(per_device_train_batch_size=8, num_train_epochs=6, learning_rate=3e-3),
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
            first_ids=g.rejected_ids[1],
        )
        for g in groups
    ]


@pytest.mark.parametrize("name", ["spin", "dpo_nll", "space", "tspin"])
def test_each_objective_trains_on_its_own_loss(
    name: str, run: Run, groups: list[Group], make_model: Callable[[int], Any], tokenizer: Any
) -> None:
    rows = one_player(groups)
    own = Objective(**{"name": name, "lambda": 0.1})
    _, log = run(rows=rows, objective=own, per_device_train_batch_size=16, policy=1)
    policy, pad_id = make_model(1), tokenizer.pad_token_id

    def scores(ids: Callable[[Group], Any]) -> torch.Tensor:
        return torch.tensor(scoring.score(policy, [(g.prompt_ids, ids(g)) for g in rows], pad_id=pad_id))

    chosen, rejected = scores(lambda g: g.chosen_ids), scores(lambda g: g.rejected_ids[0])
    first = scores(lambda g: g.first_ids)
    players = torch.tensor([g.players_chosen for g in rows]), torch.tensor([g.players_rejected[0] for g in rows])
    lengths = torch.tensor([len(g.chosen_ids) for g in rows])
    expected = {
        "spin": lambda: spin_loss(chosen, rejected, *players, scale=0.1),
        "dpo_nll": lambda: dpo_nll_loss(chosen, rejected, *players, lengths, scale=0.1),
        "space": lambda: space_loss(chosen, rejected, *players, scale=0.1),
        "tspin": lambda: tspin_loss(chosen, rejected, first, *players, scale=0.1, history=0.1),
    }[name]()
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
    _, log = run(objective=own, per_device_train_batch_size=16, policy=1)
    mean = sum(len(g.chosen_ids) for g in groups) / len(groups)
    pairs = [(g, g.rejected_ids[n], g.players_rejected[n], g.beta[n]) for g in groups for n in range(2)]
    policy = make_model(1)
    scored = scoring.score(policy, [(g.prompt_ids, ids) for g, *_ in pairs for ids in (g.chosen_ids, _[0])], pad_id=0)
    by = torch.tensor([[mean / len(g.chosen_ids), mean / len(ids)] for g, ids, *_ in pairs])
    chosen, rejected = (torch.tensor(scored).view(-1, 2) * by).unbind(1)
    expected = tpaw_loss(
        chosen,
        rejected,
        torch.tensor([g.players_chosen for g, *_ in pairs]) * by[:, :1],
        torch.tensor([players for _, _, players, _ in pairs]) * by[:, 1:],
        torch.tensor([beta for *_, beta in pairs]),
        scale=0.1,
        eta=6.0,
    )
    assert log[0]["loss"] == pytest.approx(expected.loss.mean().item(), rel=1e-4)


def test_responses_that_equal_their_target_can_be_left_out(tokenizer: Any) -> None:
    from array import array

    from tpaw_core.data.tokens import TokenRows

    def ragged(*rows: list[int]) -> TokenRows:
        return TokenRows(array("i", row) for row in rows)

    players = np.zeros((2, 1)), np.zeros((2, 2, 1)), np.ones((2, 2, 1))
    parts = ragged([1], [2]), ragged([3, 4], [5]), [ragged([3, 4], [6]), ragged([7], [5])]
    kept = Groups(*parts, *players, drop_equal=True)
    assert [[list(ids) for ids in group.rejected_ids] for group in kept] == [[[7]], [[6]]]
    assert [len(group.beta) for group in kept] == [1, 1]
    assert [len(group.rejected_ids) for group in Groups(*parts, *players)] == [2, 2]
    none = Groups(parts[0], parts[1], [parts[1]], *(p[:1] if p.ndim == 3 else p for p in players), drop_equal=True)
    made = triplets([none[0], none[1]], packing.pack, of=2)
    assert made.chosen.shape == (0,)
    assert made.beta.shape == (0, 1)


def test_the_log_counts_the_tokens_that_were_computed_also_after_a_stop(
    run: Run, groups: list[Group], tmp_path: Path
) -> None:
    _, log = run()
    in_all = sum(packing.pack([tree(g)]).inputs["input_ids"].numel() for g in groups)
    assert log[-1]["tokens"] == in_all
    assert [entry["tokens"] for entry in log] == sorted(entry["tokens"] for entry in log)
