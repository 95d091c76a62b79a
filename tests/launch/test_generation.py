from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import ranks
from tests.support.ranks import TWO
from tpaw_core.config.machine import Machine
from tpaw_core.config.params import Generation
from tpaw_core.data.endings import Ending
from tpaw_core.launch.generation import generate
from tpaw_core.launch.source import Source

pytestmark = pytest.mark.slow


def test_two_ranks_give_the_answers_of_one_in_the_order_of_the_prompts(tmp_path: Path) -> None:
    source = Source(str(ranks.save_model(tmp_path / "model", tied=True)))
    prompts = [list(group.prompt_ids) for group in ranks.make_groups()]
    options: Any = {"max_length": 40, "ending": Ending(1, (1,)), "pad_id": 0, "seed": 4}
    settings = Generation(max_new_tokens=12, batch_size=3)
    one, two = (generate(machine, tmp_path, source, prompts, settings, **options) for machine in (Machine(), TWO))
    assert two == one
    assert len({tuple(response.ids) for response in one}) > 10
    assert not list((tmp_path / "launch").iterdir())
