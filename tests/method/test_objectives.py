from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from tpaw_core.config.params import Objective, Params
from tpaw_core.engine import packing
from tpaw_core.engine.logps import response_logps
from tpaw_core.method.lengths import by_length
from tpaw_core.method.objectives.base import LogProbs, Settings, implicit_reward
from tpaw_core.method.objectives.by_name import OBJECTIVES
from tpaw_core.method.objectives.dpo_nll import dpo_nll_loss
from tpaw_core.method.objectives.space import space_loss
from tpaw_core.method.objectives.spin import spin_loss
from tpaw_core.method.objectives.tpaw import target_weight, tpaw_loss
from tpaw_core.method.objectives.tspin import tspin_loss
from tpaw_core.method.player_weights import player_weights


def tensor(*values: Any, requires_grad: bool = False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=requires_grad)


def log_probs(
    chosen: Tensor,
    rejected: Tensor,
    players_chosen: Tensor,
    players_rejected: Tensor,
    beta: Tensor | None = None,
    *,
    initial: Tensor | None = None,
    chosen_tokens: Tensor | None = None,
    rejected_tokens: Tensor | None = None,
) -> LogProbs:
    """What an objective does not read is not a number, so that reading it would show."""
    unread = torch.full_like(chosen, torch.nan)
    return LogProbs(
        chosen,
        rejected,
        unread if initial is None else initial,
        players_chosen,
        players_rejected,
        torch.full_like(players_chosen, torch.nan) if beta is None else beta,
        unread if chosen_tokens is None else chosen_tokens,
        unread if rejected_tokens is None else rejected_tokens,
    )


def loss_at(policy_chosen: Tensor, *, eta: float = 6.0) -> Tensor:
    """The loss of one triplet against one player with log pi_j(y|x) = -9, log pi_j(g|x) = -11.5; theta(g|x) = -12."""
    logps = log_probs(policy_chosen, tensor(-12.0), tensor([-9.0]), tensor([-11.5]), tensor([1.0]))
    return tpaw_loss(logps, Settings(0.1, eta=eta)).loss


# With l(u) = ln(1 + e^-u), lambda = 0.1, eta = 6, log pi_theta(y|x) = -10, log pi_theta(g|x) = -12:
#   player  log pi_j(y), (g)  P_j(y)                  P_j(g)                   alpha  u = alpha P_j(y) - P_j(g)  l(u)
#   0       -9, -11.5         0.1 (-10 + 9) = -0.1    0.1 (-12 + 11.5) = -0.05 6      -0.6 + 0.05 = -0.55       1.005492
#   1       -11, -11          0.1 (-10 + 11) = 0.1    0.1 (-12 + 11) = -0.1    1      0.1 + 0.1 = 0.2           0.598139
#   2       -10, -14          0.1 (-10 + 10) = 0      0.1 (-12 + 14) = 0.2     6      0 - 0.2 = -0.2            0.798139
@pytest.mark.parametrize(
    ("players", "beta", "expected"),
    [
        ([0], [1.0], 1.005492),
        ([0, 1], [0.25, 0.75], 0.699977),  # 0.25 * 1.005492 + 0.75 * 0.598139
        ([0, 1, 2], [0.2, 0.3, 0.5], 0.779610),  # 0.2 * 1.005492 + 0.3 * 0.598139 + 0.5 * 0.798139
    ],
)
def test_the_loss_of_one_two_and_three_players_is_the_one_worked_by_hand(
    players: list[int], beta: list[float], expected: float
) -> None:
    chosen, rejected = tensor(-9.0, -11.0, -10.0)[players], tensor(-11.5, -11.0, -14.0)[players]
    logps = log_probs(tensor(-10.0), tensor(-12.0), chosen[None], rejected[None], tensor(beta))
    found = tpaw_loss(logps, Settings(0.1, eta=6.0))
    assert found.loss.tolist() == pytest.approx([expected], abs=1e-6)
    assert found.reward_chosen[0].tolist() == pytest.approx([[-0.1, 0.1, 0.0][k] for k in players])
    assert found.reward_rejected[0].tolist() == pytest.approx([[-0.05, -0.1, 0.2][k] for k in players])
    assert found.target_active[0].tolist() == [[True, False, True][k] for k in players]


def test_triplets_do_not_influence_each_other() -> None:
    chosen, rejected = tensor([-9.0, -11.0], [-10.0, -9.0]), tensor([-11.5, -11.0], [-14.0, -11.5])
    beta = tensor([0.25, 0.75], [0.5, 0.5])
    logps = log_probs(tensor(-10.0, -10.0), tensor(-12.0, -12.0), chosen, rejected, beta)
    both = tpaw_loss(logps, Settings(0.1, eta=6.0))
    # Row 0 as above; row 1 is 0.5 * 0.798139 + 0.5 * 1.005492.
    assert both.loss.tolist() == pytest.approx([0.699977, 0.901816], abs=1e-6)


@pytest.mark.parametrize(
    ("reward", "alpha"), [(-3.0, 6.0), (-1e-12, 6.0), (0.0, 6.0), (-0.0, 6.0), (1e-12, 1.0), (3.0, 1.0)]
)
def test_the_target_weight_is_eta_up_to_a_reward_of_zero_and_one_above(reward: float, alpha: float) -> None:
    assert target_weight(tensor(reward), 6.0).tolist() == [alpha]


def test_at_the_first_step_every_target_weight_of_the_newest_player_is_eta() -> None:
    """pi_theta = pi_{t-1}: the reward is zero exactly, whatever its scale."""
    logps = torch.tensor([-123.456, -0.1, -2000.0])
    assert (target_weight(implicit_reward(logps, logps[:, None], 0.1), 6.0) == 6.0).all()


@pytest.mark.parametrize(("policy_chosen", "alpha"), [(-9.5, 6.0), (-9.0, 6.0), (-8.5, 1.0)])
def test_the_target_weight_is_a_constant_for_the_gradient(policy_chosen: float, alpha: float) -> None:
    """d loss / d log pi_theta(y|x) = -alpha * lambda / (1 + e^u), with alpha of the side that the reward is on."""
    policy = tensor(policy_chosen, requires_grad=True)
    loss_at(policy).sum().backward()
    u = alpha * 0.1 * (policy_chosen + 9.0) - 0.1 * (-12.0 + 11.5)
    assert policy.grad.tolist() == pytest.approx([-alpha * 0.1 / (1 + torch.e**u)], rel=1e-9)


@pytest.mark.parametrize("policy_chosen", [-9.5, -8.5])
def test_the_gradient_is_the_slope_of_the_loss_on_each_side_of_the_step(policy_chosen: float) -> None:
    policy = tensor(policy_chosen, requires_grad=True)
    loss_at(policy).sum().backward()
    ahead, behind = (loss_at(tensor(policy_chosen + shift)).item() for shift in (1e-5, -1e-5))
    assert policy.grad.item() == pytest.approx((ahead - behind) / 2e-5, rel=1e-7)


def test_the_loss_is_continuous_at_the_step_and_its_slope_is_not() -> None:
    at, below, above = (loss_at(tensor(-9.0 + shift)).item() for shift in (0.0, -1e-7, 1e-7))
    assert below == pytest.approx(at, abs=1e-6)
    assert above == pytest.approx(at, abs=1e-6)
    assert (below - at) / (at - above) == pytest.approx(6.0, rel=1e-3)


def test_players_and_their_weights_get_no_gradient_from_the_reported_rewards() -> None:
    policy = tensor(-10.0, requires_grad=True)
    logps = log_probs(policy, tensor(-12.0), tensor([-9.0]), tensor([-11.5]), tensor([1.0]))
    found = tpaw_loss(logps, Settings(0.1, eta=6.0))
    assert found.loss.requires_grad
    assert not any(part.requires_grad for part in found[1:])


@pytest.mark.parametrize(("eta", "pulled_up"), [(1.0, False), (6.0, True)])
def test_a_response_that_equals_its_target_teaches_only_with_target_weighting(eta: float, pulled_up: bool) -> None:
    logp = tensor(-10.0, requires_grad=True)
    player = tensor([-9.0])
    tpaw_loss(log_probs(logp, logp, player, player, tensor([1.0])), Settings(0.1, eta=eta)).loss.sum().backward()
    # u = (eta - 1) * P with P = -0.1; its slope in log pi_theta(y|x) is (eta - 1) * 0.1.
    expected = -(eta - 1) * 0.1 / (1 + torch.e ** ((eta - 1) * -0.1))
    assert logp.grad.item() == pytest.approx(expected, abs=1e-12)
    assert (logp.grad.item() < 0) == pulled_up  # descent raises the log-probability


@pytest.mark.parametrize(
    "wrong",
    [
        {"players_chosen": tensor([-9.0], [-9.0])},
        {"players_rejected": tensor([-9.0, -9.0])},
        {"beta": tensor([0.5, 0.5])},
        {"beta": tensor(1.0)},
        {"policy_chosen": tensor(-10.0, -10.0)},
        {"policy_rejected": tensor(-12.0, -12.0)},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_shapes_that_disagree_are_refused(wrong: dict[str, Tensor]) -> None:
    right = log_probs(tensor(-10.0), tensor(-12.0), tensor([-9.0]), tensor([-11.5]), tensor([1.0]))
    with pytest.raises(ValueError, match="shapes disagree"):
        tpaw_loss(right._replace(**wrong), Settings(0.1, eta=6.0))


@pytest.mark.parametrize(
    ("changes", "eta", "gamma"),
    [
        ({}, 6.0, 0.5),
        ({"target_weighting": False}, 1.0, 0.5),
        ({"player_weighting": False}, 6.0, 0.0),
        ({"name": "spin"}, 1.0, 0.0),
    ],
)
def test_switches_turn_each_weighting_off(params: Params, changes: dict[str, Any], eta: float, gamma: float) -> None:
    objective = params.objective.model_copy(update=changes)
    found = params.model_copy(update={"objective": objective}).objective_at(1)
    assert (found.eta, found.gamma, found.lambda_) == (eta, gamma, 0.1)


def test_spin_is_trls_dpo_loss_with_the_previous_checkpoint_as_reference(
    make_model: Callable[[int], Any], tokenizer: Any, params: Params, tmp_path: Path
) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    policy, reference = make_model(1), make_model(2)
    prompts = ["2 + 2 =", "A box holds 9 pens.\n"]
    chosen, rejected = [" 4", "9 pens, so 18"], ["5 is the answer", " 0"]
    trainer = DPOTrainer(
        policy,
        reference,
        args=DPOConfig(tmp_path, beta=0.1, report_to=[], bf16=False, disable_dropout=False, use_cpu=True),
        train_dataset=Dataset.from_dict({"prompt": prompts, "chosen": chosen, "rejected": rejected}),
        processing_class=tokenizer,
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    expected = trainer.compute_loss(policy, batch)

    spin = params.model_copy(update={"objective": params.objective.model_copy(update={"name": "spin"})}).objective_at(1)
    pairs = [(row["prompt_ids"], row[name]) for name in ("chosen_ids", "rejected_ids") for row in trainer.train_dataset]
    padded = packing.pad([(prompt, [ids]) for prompt, ids in pairs], tokenizer.pad_token_id)
    theta, player = response_logps(policy, padded).chunk(2), response_logps(reference, padded).chunk(2)
    player = [logps.detach()[:, None] for logps in player]
    beta = player_weights(player[0].numpy(), player[1].numpy(), gamma=spin.gamma, scale=spin.lambda_)
    logps = log_probs(*theta, *player, torch.tensor(beta).float())
    found = tpaw_loss(logps, Settings(spin.lambda_, eta=spin.eta)).loss.mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    slopes = torch.autograd.grad(expected, policy.parameters())
    for ours, theirs in zip(torch.autograd.grad(found, policy.parameters()), slopes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


# The other methods on one triplet: log pi_theta(y) = -10, (g) = -12, (g0) = -13; log pi_{t-1}(y) = -9, (g) = -11.5.
# With lambda = 0.1: P(y) = 0.1 (-10 + 9) = -0.1 and P(g) = 0.1 (-12 + 11.5) = -0.05. ln means the natural logarithm.
CHOSEN, REJECTED, INITIAL = tensor(-10.0), tensor(-12.0), tensor(-13.0)
PLAYERS = tensor([-9.0]), tensor([-11.5])


def test_spin_by_hand() -> None:
    found = spin_loss(log_probs(CHOSEN, REJECTED, *PLAYERS), Settings(0.1))
    assert found.loss.tolist() == pytest.approx([0.718459], abs=1e-6)  # ln(1 + e^0.05), u = -0.1 + 0.05
    assert found.reward_chosen.tolist() == [[pytest.approx(-0.1)]]
    assert found.reward_rejected.tolist() == [[pytest.approx(-0.05)]]


def test_dpo_with_a_likelihood_term_by_hand() -> None:
    found = dpo_nll_loss(log_probs(CHOSEN, REJECTED, *PLAYERS, chosen_tokens=tensor(4.0)), Settings(0.1))
    assert found.loss.tolist() == pytest.approx([3.218459], abs=1e-6)  # SPIN's 0.718459 + 10 / 4


@pytest.mark.parametrize(
    ("mu", "expected"),
    [
        # r(y) = -1, r(g) = -0.5. mu = 1: -ln s(-1) - ln s(0.5) = ln(1 + e^1) + ln(1 + e^-0.5)
        (1.0, 1.787339),  # 1.313262 + 0.474077
        # mu = 2: ln(1 + 2 e^1) + 2 ln(1 + 0.5 e^-0.5)
        (2.0, 2.391741),  # 1.861995 + 2 * 0.264873
    ],
)
def test_space_by_hand(mu: float, expected: float) -> None:
    found = space_loss(log_probs(CHOSEN, REJECTED, *PLAYERS), Settings(0.1), mu=mu)
    assert found.loss.tolist() == pytest.approx([expected], abs=1e-6)
    assert found.reward_chosen.tolist() == [[pytest.approx(-0.1)]]


def test_tspin_by_hand() -> None:
    found = tspin_loss(log_probs(CHOSEN, REJECTED, *PLAYERS, initial=INITIAL), Settings(0.1, history=0.1))
    # ln(1 + e^-2) + 0.1 ln(1 + e^-1) with log pi(y) - log pi(g) = 2 and log pi(g) - log pi(g0) = 1
    assert found.loss.tolist() == pytest.approx([0.158254], abs=1e-6)  # 0.126928 + 0.1 * 0.313262
    assert found.reward_chosen.tolist() == [[pytest.approx(-0.1)]]


def test_tspin_without_history_is_spin_without_a_reference() -> None:
    flat = tensor([0.0]), tensor([0.0])
    logps = log_probs(CHOSEN, REJECTED, *flat, initial=INITIAL)
    assert tspin_loss(logps, Settings(1.0, history=0.0)).loss.tolist() == spin_loss(logps, Settings(1.0)).loss.tolist()


def test_spin_is_tpaw_with_one_player_and_no_target_weight() -> None:
    tpaw = tpaw_loss(log_probs(CHOSEN, REJECTED, *PLAYERS, tensor([1.0])), Settings(0.1, eta=1.0)).loss
    assert spin_loss(log_probs(CHOSEN, REJECTED, *PLAYERS), Settings(0.1)).loss.tolist() == tpaw.tolist()


def test_the_likelihood_term_is_all_that_dpo_nll_adds() -> None:
    policy = tensor(-10.0, requires_grad=True)
    logps = log_probs(policy, REJECTED, *PLAYERS, chosen_tokens=tensor(4.0))
    both = dpo_nll_loss(logps, Settings(0.1)).loss
    spin = spin_loss(logps, Settings(0.1)).loss
    (slope,) = torch.autograd.grad((both - spin).sum(), policy)
    assert slope.tolist() == pytest.approx([-1 / 4])


def test_space_at_equal_policies_pushes_target_and_answer_alike() -> None:
    """r = 0, mu = 1: two binary cross-entropies at even odds, slope -1/2 and +1/2."""
    chosen, rejected = tensor(-9.0, requires_grad=True), tensor(-11.5, requires_grad=True)
    loss = space_loss(log_probs(chosen, rejected, *PLAYERS), Settings(0.1)).loss
    assert loss.tolist() == pytest.approx([2 * 0.693147], abs=1e-6)
    assert [g.item() for g in torch.autograd.grad(loss.sum(), (chosen, rejected))] == pytest.approx([-0.5, 0.5])


def test_lambda_by_length_by_hand() -> None:
    """Mean length 4, |y| = 2, |g| = 8: log pi(y) counts twice, log pi(g) half.

    P(y) = 0.1 * 2 (-10 + 9) = -0.2, P(g) = 0.1 * 0.5 (-12 + 11.5) = -0.025; u = 6 * -0.2 + 0.025 = -1.175.
    """
    logps = log_probs(CHOSEN, REJECTED, *PLAYERS, tensor([1.0]), chosen_tokens=tensor(2.0), rejected_tokens=tensor(8.0))
    found = tpaw_loss(logps, Settings(0.1, eta=6.0, mean_tokens=4.0))
    assert found.loss.tolist() == pytest.approx([1.444125], abs=1e-6)  # ln(1 + e^1.175)
    assert found.reward_chosen.tolist() == [[pytest.approx(-0.2)]]
    assert found.reward_rejected.tolist() == [[pytest.approx(-0.025)]]


def test_lambda_by_length_is_the_same_in_numpy_and_torch() -> None:
    logps, tokens = [-3.0, -8.0], [2, 5]
    expected = [-3.0 * 4 / 2, -8.0 * 4 / 5]
    assert by_length(np.array(logps), np.array(tokens), 4.0).tolist() == pytest.approx(expected)
    assert by_length(tensor(*logps), torch.tensor(tokens), 4.0).tolist() == pytest.approx(expected)


def test_every_objective_of_the_parameters_has_its_loss() -> None:
    """All but sft, which learns from the targets alone."""
    assert {*OBJECTIVES, "sft"} == set(get_args(Objective.model_fields["name"].annotation))
    own = {"tpaw": tpaw_loss, "spin": spin_loss, "tspin": tspin_loss, "space": space_loss, "dpo_nll": dpo_nll_loss}
    assert own == OBJECTIVES


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_reported_rewards_of_every_objective_are_detached(name: str) -> None:
    policy, tokens = tensor(-10.0, requires_grad=True), tensor(4.0)
    logps = log_probs(
        policy, policy, *PLAYERS, tensor([1.0]), initial=policy, chosen_tokens=tokens, rejected_tokens=tokens
    )
    found = OBJECTIVES[name](logps, Settings(0.1, eta=6.0, history=0.1))
    assert found.loss.requires_grad
    assert not any(part.requires_grad for part in found[1:])
    assert found.reward_chosen.tolist() == [[pytest.approx(-0.1)]]
