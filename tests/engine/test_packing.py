from __future__ import annotations

from tests.support.groups import SMALL
from tpaw_core.engine import packing


def test_a_pack_has_no_padding_and_positions_continue_from_the_prompt() -> None:
    pack = packing.pack(SMALL)
    assert pack.inputs["input_ids"].tolist() == [[5, 6, 7, 11, 17, 18, 8, 8, 12, 13, 14, 15, 20]]
    assert pack.inputs["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1, 3, 3, 1, 2, 3, 4, 2]]
    assert pack.target.tolist() == [8, 9, 10, 8, 9, 12, 13, 14, 15, 16, 19, 20, 21]
    assert pack.source.tolist() == [2, 6, 2, 2, 7, 3, 8, 9, 10, 11, 5, 5, 12]
    assert pack.sequence.tolist() == [0, 0, 1, 2, 2, 3, 3, 3, 3, 3, 4, 5, 5]
    assert pack.responses == 6


def test_rows_are_padded_on_the_right() -> None:
    pack = packing.pad([([1, 2], [[3]]), ([4], [[5, 6, 7]])], pad_id=9)
    assert pack.inputs["input_ids"].tolist() == [[1, 2, 3, 9], [4, 5, 6, 7]]
    assert pack.inputs["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert pack.source.tolist() == [1, 4, 5, 6]
    assert pack.target.tolist() == [3, 5, 6, 7]
    assert pack.sequence.tolist() == [0, 1, 1, 1]


def test_parts_hold_at_most_the_given_tokens_and_keep_the_order() -> None:
    parts = [[(SMALL * 2)[i] for i in part] for part in packing.split([packing.tokens(g) for g in SMALL * 2], 14)]
    assert [group for part in parts for group in part] == SMALL * 2
    assert [sum(map(packing.tokens, part)) for part in parts] == [14, 13, 11]
    assert [len(part) for part in packing.split([packing.tokens(g) for g in SMALL], 1)] == [1, 1, 1]
