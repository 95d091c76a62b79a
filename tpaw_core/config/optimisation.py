"""What sft and training share: how weights are trained."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from tpaw_core.config.section import Count, Fraction, NotNegative, Positive, Section

# Of optimisers that do not take a tensor that is divided among processes.
WHOLE_ONLY = ("bnb", "paged", "8bit", "adafactor")
EARLIER = {"per_device_train_batch_size", "gradient_accumulation_steps"}


def one_batch_size(section: Any) -> None:
    """Replace the keys of earlier versions by their product, the prompts of one step."""
    if isinstance(section, dict) and "per_device_train_batch_size" in section and "train_batch_size" not in section:
        numbers = section["per_device_train_batch_size"], section.get("gradient_accumulation_steps", 1)
        if all(type(number) is int and number > 0 for number in numbers):
            section["train_batch_size"] = numbers[0] * numbers[1]
            for name in EARLIER & section.keys():
                del section[name]


class Optimisation(Section):
    """What sft and training share; a field is transformers.TrainingArguments' field of the same name, if it has one."""

    learning_rate: Positive
    num_train_epochs: Positive
    # Prompts per optimiser step on all processes together, each with its target and (in training) all responses.
    train_batch_size: Count
    max_tokens: Count = 4096  # most tokens of one forward and backward pass; a longer batch is cut into several
    sharded: bool = False  # FSDP2: weights, gradients and optimiser state are divided among machine.processes
    cpu_offload: bool = (
        False  # of a sharded model: they lie in main memory, and the accelerator has one layer at a time
    )
    optim: str = "adamw_torch"
    weight_decay: NotNegative = 0.0
    lr_scheduler_type: str = "linear"
    warmup_ratio: Fraction = 0.1
    max_grad_norm: NotNegative = 1.0
    bf16: Literal[True, False, "auto"] = False  # auto: where the device multiplies bfloat16 faster than float32
    activation_checkpointing: bool = False
    save_steps: Count = 100  # a multiple of logging_steps, so that a resumed log equals an uninterrupted one
    logging_steps: Count = 10

    @model_validator(mode="before")
    @classmethod
    def _one_batch_size(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        given = dict(given)
        one_batch_size(given)
        if EARLIER & given.keys():
            raise ValueError(f"set train_batch_size, which replaces {' x '.join(sorted(EARLIER, reverse=True))}")
        return given

    @model_validator(mode="after")
    def _agree_with_itself(self) -> Optimisation:
        if self.save_steps % self.logging_steps:
            raise ValueError(f"save_steps: must be a multiple of logging_steps ({self.logging_steps})")
        if self.cpu_offload and not self.sharded:
            raise ValueError("cpu_offload: works on a sharded model; set sharded=true as well")
        whole = any(word in self.optim for word in WHOLE_ONLY) and not self.optim.startswith("adamw_torch")
        if self.sharded and whole:
            raise ValueError(
                f"optim: {self.optim} does not work on a sharded model; use adamw_torch, rmsprop or adamw_torch_8bit"
            )
        return self


class Sft(Optimisation):
    enabled: bool = True  # false: checkpoint 0 is model.model_name_or_path as it is
