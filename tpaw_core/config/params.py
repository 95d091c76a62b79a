"""The parameters: one typed tree. Field names are Hugging Face's where they have one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from tpaw_core.config.machine import Machine
from tpaw_core.config.optimisation import Optimisation, Sft
from tpaw_core.config.section import Count, Fraction, NotNegative, Positive, Section
from tpaw_core.workspace.files import digest

Precision = Literal["float32", "bfloat16"]
# In which policies are scored and trained: float32 weights and products; bfloat16 products; a bfloat16 base under LoRA;
# bfloat16 weights, as the layers of a sharded model compute.
Regime = Literal["float32", "bfloat16", "bfloat16_base", "bfloat16_weights"]


# Arguments of apply_chat_template that decide what is rendered, and how.
NOT_FOR_THE_TEMPLATE = {
    *("conversation", "messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message"),
    *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs", "sanitize_control_tokens"),
}


class Scratch(Section):
    """A Llama-architecture model and a byte-level BPE tokenizer made from the training rows."""

    vocab_size: Annotated[int, Field(ge=300)] = 512
    hidden_size: Count = 128
    intermediate_size: Count = 384
    num_hidden_layers: Count = 3
    num_attention_heads: Count = 4


class Model(Section):
    model_name_or_path: str | None = None  # hub id or local folder; null: train `scratch` from nothing
    revision: str | None = None
    chat_template: str | None = None  # a Jinja template or a file that contains one, in place of the tokenizer's own
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)  # for the template: {enable_thinking: false}
    # Of checkpoints on disk. auto: float32, in which they are trained; a ready model (sft.enabled=false) as it came.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    max_length: Count = 1024  # prompt and response together, in tokens
    scratch: Scratch | None = None
    # Of LoRA adapters: folder or hub id of their base, where neither they nor model_name_or_path name it, or it moved.
    base: str | None = None

    @field_validator("chat_template_kwargs")
    @classmethod
    def _for_the_template(cls, given: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(NOT_FOR_THE_TEMPLATE & set(given)):
            raise ValueError(f"{taken[0]} is set by tpaw itself; only what the chat template asks for belongs here")
        return given


class Lora(Section):
    """Train adapters (float32) on a frozen base (bfloat16), by PEFT; each field is LoraConfig's of the same name.

    The base computes in bfloat16, so sft.bf16 and training.bf16 do not apply. A model from scratch has no base yet: its
    SFT trains all weights, and checkpoint 0, in bfloat16, is the base of the adapters that follow.
    """

    r: Count = 16
    alpha: Positive = 32
    target_modules: str | list[str] = "all-linear"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # in SFT; self-play has none

    @field_validator("target_modules", mode="before")
    @classmethod
    def _names(cls, given: Any) -> Any:
        names = given if isinstance(given, list) else [given]
        if not names or not all(isinstance(name, str) and name for name in names):
            raise ValueError("must be all-linear, a list of module names, or a regular expression that matches them")
        return given


class Data(Section):
    path: str  # "arithmetic", a file or folder of rows, or a hub id
    heldout_path: str | None = (
        None  # a second file or folder; a hub data set, or a folder of splits, uses heldout_split
    )
    dataset_config: str | None = None  # a hub data set's configuration, e.g. "main"
    train_split: str = "train"
    heldout_split: str = "test"
    format: Literal["auto", "mawps"] = "auto"
    prompt_column: str = "prompt"
    completion_column: str = "completion"
    max_train_rows: Count | None = None
    max_heldout_rows: Count | None = None
    max_self_play_rows: Count | None = None  # only the first N training rows are used for self-play; SFT uses all
    validation_rows: Count | None = None  # the first N held-out rows become the benchmark `validation`
    drop_overlap: bool = False  # leave held-out rows out whose prompt is in train, instead of stopping
    max_skipped: Fraction = 0.01  # share of unusable rows above which a stage stops


class Generation(Section):
    backend: Literal["transformers", "vllm"] = "transformers"
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"  # of the weights; auto: what the device multiplies faster
    python: str | None = None  # interpreter that has vllm; null: .venv-vllm/bin/python
    temperature: NotNegative = 1.0  # 0: greedy
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_new_tokens: Count = 512
    batch_size: Count = 64


class Team(Section):
    policy: Literal["latest"] = "latest"
    size: Count = 3
    players: Count | None = None  # how many of the newest members judge; every member is an opponent. null: all judge
    # Iterations, or digests of checkpoints (8 characters or more), that never play.
    exclude: list[int | Annotated[str, Field(pattern="^[0-9a-f]{8,64}$")]] = Field(default_factory=list)


class Objective(Section):
    name: Literal["tpaw", "spin", "tspin", "space", "dpo_nll", "sft"] = "tpaw"
    lambda_: Positive = Field(default=0.1, alias="lambda")
    eta: Annotated[float, Field(ge=1)] = 6.0
    gamma: NotNegative = 0.5
    target_weighting: bool = True  # TRW; false: alpha = 1
    player_weighting: bool = True  # MPW; false: beta = 1 / players
    history: NotNegative = 0.1  # T-SPIN's weight of its second term, from iteration 2 on
    drop_equal: bool = False  # a variant: leave triplets out whose response equals the target
    per_token: bool = False  # a variant: lambda times the targets' mean length, over the length of each text


class Evaluation(Section):
    """lm-evaluation-harness tasks by name; `heldout` and `validation` are this project's, on data/<name>.jsonl."""

    tasks: Annotated[list[str], Field(min_length=1)] = Field(default_factory=lambda: ["heldout"])
    primary: str = "heldout"
    metric: str = "exact_match"
    answer_pattern: str = r"#### (\-?[0-9\.\,]+)"
    max_new_tokens: Count = 512
    batch_size: Count = 64
    limit: Count | None = None

    @field_validator("answer_pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"is not a valid regular expression ({error})") from None
        return pattern


class Iteration(Section):
    """One entry of `iterations`: its parent, and what this iteration alone sets differently."""

    previous: Annotated[int, Field(ge=0)]
    learning_rate: Positive | None = None
    lambda_: Positive | None = Field(default=None, alias="lambda")
    eta: Annotated[float, Field(ge=1)] | None = None


class Params(Section):
    recipe: str
    seed: int = 42
    model: Model
    data: Data
    sft: Sft
    generation: Generation = Generation()
    team: Team = Team()
    objective: Objective = Field(default_factory=lambda: Objective.model_validate({}))
    training: Optimisation
    evaluation: Evaluation = Evaluation()
    lora: Lora | None = None  # null: all weights are trained
    machine: Machine = Machine()
    iterations: Annotated[dict[str, Iteration], Field(min_length=1)]

    @model_validator(mode="after")
    def _agree(self) -> Params:
        if self.model.model_name_or_path is None and self.model.scratch is None:
            raise ValueError("model: set model_name_or_path, or set scratch to train a small model from scratch")
        if self.model.model_name_or_path is None and not self.sft.enabled:
            raise ValueError(
                "sft.enabled: a model from scratch is untrained; set this to true, or set model.model_name_or_path"
            )
        sharded = [name for name in ("sft", "training") if getattr(self, name).sharded]
        if sharded and self.machine.world_size == 1:
            raise ValueError(f"{sharded[0]}.sharded: needs several processes; set machine.processes to 2 or more")
        precisions: dict[str, object] = {"generation.dtype": self.generation.dtype}
        if self.lora is None:
            precisions |= {"sft.bf16": self.sft.bf16, "training.bf16": self.training.bf16}
        auto = next((key for key, value in precisions.items() if value == "auto"), None)
        if auto is not None and self.machine.launch is not None:
            raise ValueError(
                f"{auto}: auto picks the precision that is faster here, but machine.launch may start processes "
                "on other machines; set the precision explicitly"
            )
        if self.machine.tensor_parallel > 1 and self.generation.backend != "vllm":
            raise ValueError("machine.tensor_parallel: only vllm divides a model; set generation.backend=vllm")
        if self.sft.sharded and self.model.model_name_or_path is None:
            raise ValueError("sft.sharded: a model from scratch is small enough for each process; set this to false")
        if self.objective.name != "tpaw" and 1 not in (self.team.size, self.team.players):
            raise ValueError(
                f"team.players: objective.name={self.objective.name} supports only one player; set team.players=1"
            )
        if "validation" in self.evaluation.tasks and self.data.validation_rows is None:
            raise ValueError(
                "data.validation_rows: evaluation.tasks includes validation; set the number of validation rows"
            )
        own = {"heldout", "validation"} & {
            self.evaluation.primary,
            *self.evaluation.tasks,
        }  # what a group holds only the harness knows
        if self.evaluation.primary not in self.evaluation.tasks and own:
            raise ValueError(f"evaluation.primary: {self.evaluation.primary!r} is not in evaluation.tasks")
        for number, (key, entry) in enumerate(self.iterations.items(), start=1):
            if key != str(number) or entry.previous != number - 1:
                raise ValueError(
                    f"iterations.{key}: the keys must be 1, 2, 3, ... in order, and each entry's `previous` must be "
                    f"one less than its key; write '{number}': {{previous: {number - 1}}} here"
                )
        return self

    def objective_at(self, iteration: int) -> Objective:
        """The objective of one iteration: `iterations.<t>` wins, and only TPAW has weights."""
        own, plain = self.iterations[str(iteration)], self.objective.name != "tpaw"
        changes = {name: value for name in ("lambda_", "eta") if (value := getattr(own, name)) is not None}
        if plain or not self.objective.target_weighting:
            changes["eta"] = 1.0
        if plain or not self.objective.player_weighting:
            changes["gamma"] = 0.0
        if iteration == 1:  # checkpoint 0's answers are the only ones
            changes["history"] = 0.0
        return self.objective.model_copy(update=changes)

    def training_at(self, iteration: int) -> Optimisation:
        """The optimisation of one iteration: `iterations.<t>.learning_rate` wins."""
        own = self.iterations[str(iteration)].learning_rate
        return self.training if own is None else self.training.model_copy(update={"learning_rate": own})

    @property
    def checkpoint_dtype(self) -> str:
        """Of whole models: float32, as trained, unless model.dtype says otherwise; with lora bfloat16, as a base."""
        if self.lora is not None:
            return "bfloat16"
        return "float32" if self.model.dtype == "auto" else self.model.dtype

    def digest(self) -> str:
        """Of every value but where it runs; keys that came later do not count while they are null or false."""
        tree = self.model_dump(by_alias=True, exclude={"machine"})
        for section in (tree["sft"], tree["training"]):
            for key in ("sharded", "cpu_offload"):
                if not section[key]:
                    del section[key]
        for section, key in ((tree, "lora"), (tree["model"], "base")):
            if section[key] is None:
                del section[key]
        return digest(tree)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree's leaves by dotted key."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves.update(flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value})
    return leaves
