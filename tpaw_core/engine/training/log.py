"""What training reports while it runs: progress, metrics, and the first number that is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from transformers import TrainerCallback

from tpaw_core.errors import Diverged
from tpaw_core.progress import Progress

OnLog = Callable[[int, dict[str, float]], None]


class TrainingLog(TrainerCallback):
    """Sends metrics to ``send``. Raises Diverged where one is not finite."""

    def __init__(self, what: str, send: OnLog, row_ids: Sequence[str]) -> None:
        self.what, self.send, self.row_ids = what, send, row_ids
        self.progress: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress = Progress(state.max_steps, self.what)
        self.progress.done = state.global_step
        for entry in state.log_history:
            self._send(entry)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert self.progress is not None
        self.progress.advance()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self._send(state.log_history[-1])

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert self.progress is not None
        self.progress.close()

    def _name(self, row: int) -> str:
        return f"the row with prompt_id {self.row_ids[row]}" if self.row_ids else f"row {row + 1}"

    def _send(self, entry: dict[str, float]) -> None:
        if "loss" not in entry:
            return
        bad = [name for name, value in entry.items() if not math.isfinite(value)]
        if bad:
            row = int(entry["row"]) if "row" in entry else None
            first = f", first in {self._name(row)}" if row is not None else ""
            raise Diverged(
                f"{self.what}: {', '.join(bad)} not finite (seen at step {entry['step']}{first}); lower the "
                "learning rate or check the rows. The last good state is kept; no checkpoint was written"
            )
        self.send(int(entry["step"]), {name: value for name, value in entry.items() if name != "step"})
