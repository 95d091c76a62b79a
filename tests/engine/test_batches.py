from __future__ import annotations

import numpy as np

from tpaw_core.data.tokens import TokenRows
from tpaw_core.engine import packing
from tpaw_core.engine.training.batches import Group, Groups, triplets


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
    assert part.chosen_tokens.tolist() == [1, 1, 1, 1]
    assert part.rejected_tokens.tolist() == [2, 1, 2, 2]
    assert part.initial.tolist() == part.rejected.tolist(), "no objective reads it"
    assert part.groups == 5


def test_the_initial_answer_is_computed_once_with_the_others() -> None:
    asked = Group([1], [3], [[4, 5], [6]], [-1.0], [[-2.0], [-3.0]], [[1.0]] * 2, initial_ids=[6], row=7)
    part = triplets([asked], packing.pack, of=1)
    assert part.pack.responses == 3
    assert part.initial.tolist() == [2, 2]
    assert part.rejected.tolist() == [1, 2]
    assert part.rows.tolist() == [7, 7]


def test_responses_that_equal_their_target_can_be_left_out() -> None:
    players = np.zeros((2, 1)), np.zeros((2, 2, 1)), np.ones((2, 2, 1))
    parts = TokenRows([[1], [2]]), TokenRows([[3, 4], [5]]), [TokenRows([[3, 4], [6]]), TokenRows([[7], [5]])]
    kept = Groups(*parts, *players, drop_equal=True)
    assert [[list(ids) for ids in group.rejected_ids] for group in kept] == [[[7]], [[6]]]
    assert [len(group.beta) for group in kept] == [1, 1]
    assert [len(group.rejected_ids) for group in Groups(*parts, *players)] == [2, 2]
    none = Groups(parts[0], parts[1], [parts[1]], *(p[:1] if p.ndim == 3 else p for p in players), drop_equal=True)
    made = triplets([none[0], none[1]], packing.pack, of=2)
    assert made.chosen.shape == (0,)
    assert made.beta.shape == (0, 1)
