from __future__ import annotations

from types import SimpleNamespace

import pytest

from tpaw_core.data.endings import Ending, fit, limits, saved_stop_ids
from tpaw_core.errors import TpawError

ENDING = Ending(1)


@pytest.mark.parametrize(
    ("ids", "room", "expected"),
    [
        ([5, 1, 0, 0], 9, ([5, 1], "stop")),
        ([5, 6], 2, ([5, 6], "length")),
        ([5, 6, 1], 2, ([5, 6], "length")),
        ([5, 1], 2, ([5, 1], "stop")),
        ([5, 1, 6, 1], 9, ([5, 1], "stop")),
        ([1], 1, ([1], "stop")),
    ],
)
def test_cut_removes_what_follows_eos_or_exceeds_the_room(
    ids: list[int], room: int, expected: tuple[list[int], str]
) -> None:
    response = ENDING.cut(ids, room)
    assert (list(response.ids), response.finish_reason) == expected


def test_a_target_ends_in_eos_unless_it_is_cut_at_max_length() -> None:
    prompt, target = [2, 3, 4], ENDING.close([5, 6])
    assert target == [5, 6, 1]
    assert fit(target, prompt, max_length=7) == [5, 6, 1]
    assert fit(target, prompt, max_length=6) == [5, 6, 1]
    assert fit(target, prompt, max_length=5) == [5, 6]
    assert fit(target, prompt, max_length=4) == [5]


def test_an_answer_has_the_room_that_its_prompt_leaves() -> None:
    assert limits([[2], [2] * 6, [2] * 9], max_new_tokens=4, max_length=10) == [4, 4, 1]


def test_the_ending_is_the_tokenizers_eos() -> None:
    assert Ending.of(SimpleNamespace(eos_token_id=7)) == Ending(7)
    assert Ending(7).stop_ids == (7,)


def test_a_tokenizer_without_eos_is_refused() -> None:
    with pytest.raises(TpawError, match="some/model: its tokenizer has no EOS token"):
        Ending.of(SimpleNamespace(eos_token_id=None, name_or_path="some/model"))


@pytest.mark.parametrize("own", [None, 7, [7, 8]])
def test_a_checkpoint_tells_others_what_its_model_stops_at(own: int | list[int] | None) -> None:
    assert saved_stop_ids(SimpleNamespace(eos_token_id=own)) == own
