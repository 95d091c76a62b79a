from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tpaw_core.data.endings import Ending, configured, fit, limits

ENDING = Ending(1, (1,))


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


@pytest.mark.parametrize(
    ("ids", "expected"),
    [([5, 3, 1, 6], ([5, 3], "stop")), ([5, 1, 3], ([5, 1], "stop")), ([5, 6], ([5, 6], "length"))],
)
def test_an_answer_ends_at_whichever_stop_token_comes_first(ids: list[int], expected: tuple[list[int], str]) -> None:
    response = Ending(1, (1, 3)).cut(ids, 9)
    assert (list(response.ids), response.finish_reason) == expected


def test_a_target_that_the_template_has_ended_gets_no_second_end() -> None:
    ending = Ending(1, (1, 3), in_template=True)
    assert ending.close([5, 6, 1]) == [5, 6, 1]
    assert ending.close([5, 3]) == [5, 3, 1]
    assert (ending.early([5, 3, 1]), ending.early([5, 6, 1])) == (3, None)
    assert ending.close([5, 6]) == [5, 6, 1]


@pytest.mark.parametrize(("own", "expected"), [(None, []), (7, [7]), ([7, 8], [7, 8]), ((7, 8), [7, 8])])
def test_a_configuration_names_no_stop_token_one_or_many(own: Any, expected: list[int]) -> None:
    assert configured(SimpleNamespace(eos_token_id=own)) == expected


def test_stop_tokens_of_configurations_in_their_order() -> None:
    settings = [SimpleNamespace(eos_token_id=eos) for eos in ([7, 2], 2, None, 5)]
    assert configured(settings[0], None, *settings[1:]) == [7, 2, 5]


def test_an_answer_s_own_text_follows_what_the_template_writes_before_it() -> None:
    ending = Ending(1, (1,), opening="</think>")
    assert ending.answer("<think>\n3 x 2\n</think>\n\n6 ") == "6"
    assert ending.answer("6") == "6"
    assert ENDING.answer("<think>\n\n</think>\n\n6") == "<think>\n\n</think>\n\n6"
