"""The machine: on how many processes and nodes a model computes."""

from __future__ import annotations

from pydantic import model_validator

from tpaw_core.config.section import Count, Section


class Machine(Section):
    """Where stages run. It decides no bytes but rounding, so nothing is made again when it changes."""

    processes: Count = 1  # on each node, one accelerator each
    nodes: Count = 1
    tensor_parallel: Count = 1  # accelerators that share one copy of the weights in vllm; the others hold more copies
    launch: str | None = None  # words that start the processes, before those of the worker; null: torchrun, here
    timeout: Count = 7200  # seconds that one process waits for another

    @property
    def world_size(self) -> int:
        return self.processes * self.nodes

    @model_validator(mode="after")
    def _possible(self) -> Machine:
        if self.processes % self.tensor_parallel:
            raise ValueError(f"tensor_parallel: must divide processes, which is {self.processes}")
        if self.nodes > 1 and self.launch is None:
            raise ValueError("launch: name what starts processes on several nodes; docs/scale.md has examples")
        return self
