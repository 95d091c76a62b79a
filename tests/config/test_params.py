from __future__ import annotations

import re
from pathlib import Path

import pytest

from tpaw_core.config import params_file
from tpaw_core.config.machine import Machine
from tpaw_core.config.params import Lora
from tpaw_core.errors import TpawError
from tpaw_core.workspace import files
from tpaw_core.workspace.paths import Workspace

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "recipes" / "demo.yaml")
WORKSPACE = Workspace(ROOT)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        # unknown keys name the near match
        ("objective.etaa=3", "unknown key 'objective.etaa' (did you mean 'eta'?)"),
        ("objective.lamda=3", "unknown key 'objective.lamda' (did you mean 'lambda'?)"),
        ("objctive.eta=3", "unknown key 'objctive' (did you mean 'objective'?)"),
        ("training.learning_rte=1e-6", "(did you mean 'learning_rate'?)"),
        ("sft.enable=true", "(did you mean 'enabled'?)"),
        ("model.scratch.hidden_sise=8", "(did you mean 'hidden_size'?)"),
        ("iterations.1.learning_rte=1e-6", "(did you mean 'learning_rate'?)"),
        ("objective={lambda_: 3}", "unknown key 'objective.lambda_' (did you mean 'lambda'?)"),
        ("zzz=3", "unknown key 'zzz'; remove it"),
        # wrong types and ranges name the key and the value
        ("training.learning_rate=fast", "training.learning_rate: Input should be a valid number"),
        ("seed=many", "seed: Input should be a valid integer, unable to parse string as an integer, got 'many'"),
        ("seed=", "seed: Input should be a valid integer"),
        ("seed=1.5", "seed: Input should be a valid integer"),
        ("evaluation.tasks=heldout", "evaluation.tasks: Input should be a valid list"),
        ("evaluation.tasks=[]", "evaluation.tasks: List should have at least 1 item"),
        ("team.exclude=3", "team.exclude: Input should be a valid list"),
        ("data=arithmetic", "data: Input should be a valid dictionary"),
        ("objective.eta=0.5", "objective.eta: Input should be greater than or equal to 1, got 0.5"),
        ("objective.eta=.nan", "objective.eta"),
        ("objective.gamma=-1", "objective.gamma: Input should be greater than or equal to 0"),
        ("objective.lambda=0", "objective.lambda: Input should be greater than 0"),
        ("objective.name=dpo", "'dpo_nll' or 'sft', got 'dpo'"),
        ("evaluation.tasks=[heldout, validation]", "data.validation_rows: evaluation.tasks includes validation"),
        ("team.size=0", "team.size: Input should be greater than or equal to 1, got 0"),
        ("generation.temperature=-1", "generation.temperature: Input should be greater than or equal to 0"),
        ("generation.top_p=0", "generation.top_p: Input should be greater than 0"),
        ("generation.top_p=1.1", "generation.top_p: Input should be less than or equal to 1"),
        ("generation.backend=sglang", "generation.backend: Input should be 'transformers' or 'vllm'"),
        ("data.max_skipped=2", "data.max_skipped: Input should be less than or equal to 1"),
        ("model.max_length=0", "model.max_length: Input should be greater than or equal to 1"),
        *(
            (f"model.chat_template_kwargs.{name}=true", f"model.chat_template_kwargs: {name} is set by tpaw itself")
            for name in ("tokenize", "add_generation_prompt", "continue_final_message", "return_dict", "max_length")
        ),
        ("model.dtype=float16", "model.dtype: Input should be 'auto', 'float32' or 'bfloat16'"),
        ("training.learning_rate=0", "training.learning_rate: Input should be greater than 0"),
        ("training.learning_rate=.inf", "training.learning_rate"),
        ("training.train_batch_size=0", "train_batch_size: Input should be greater"),
        ("evaluation.answer_pattern='#### ('", "evaluation.answer_pattern"),
        # values that do not agree with each other
        ("training.save_steps=15", "save_steps: must be a multiple of logging_steps (10)"),
        ("objective.name=spin", "team.players: objective.name=spin supports only one player; set team.players=1"),
        ("evaluation.primary=gsm8k", "evaluation.primary: 'gsm8k' is not in evaluation.tasks"),
        ("model.scratch=null", "model: set model_name_or_path, or set scratch"),
        ("sft.enabled=false", "sft.enabled: a model from scratch is untrained"),
        ("iterations={}", "iterations: Dictionary should have at least 1 item"),
        ("iterations.1.previous=3", "`previous` must be one less than its key; write '1': {previous: 0} here"),
        ("iterations.6.previous=5", "write '5': {previous: 4} here"),
        # missing sections and keys
        ("training=null", "training: Input should be a valid dictionary"),
        ("training={num_train_epochs: 1}", "'training.learning_rate' is missing; add it"),
        ("data={max_train_rows: 1}", "'data.path' is missing; add it"),
    ],
)
def test_a_bad_parameter_is_refused_by_a_message_that_names_it(override: str, message: str) -> None:
    with pytest.raises(TpawError, match=re.escape(message)):
        params_file.resolve(WORKSPACE, DEMO, [override])


def test_every_bad_parameter_has_its_own_line() -> None:
    with pytest.raises(TpawError) as caught:
        params_file.resolve(WORKSPACE, DEMO, ["objective.eta=0", "team.size=0", "seeed=1"])
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert all(line.startswith(f"{DEMO} with objective.eta, team.size, seeed given: ") for line in lines)


@pytest.mark.parametrize("section", ["model", "data", "sft", "training", "iterations"])
def test_a_missing_section_is_named(section: str, tmp_path: Path) -> None:
    lines, skipping = [], False
    for line in Path(DEMO).read_text().splitlines():
        skipping = line.startswith(f"{section}:") or (skipping and line.startswith(" "))
        lines += [] if skipping else [line]
    path = tmp_path / "params.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(TpawError, match=f"{path}: '{section}' is missing; add it"):
        params_file.load(path)


def test_a_new_iteration_goes_on_with_the_settings_of_the_last() -> None:
    params, _ = params_file.resolve(WORKSPACE, DEMO, ["iterations.4.lambda=5", "iterations.4.learning_rate=1e-7"], 5)
    assert params.objective_at(5).lambda_ == 5.0
    assert params.training_at(5).learning_rate == 1e-7


def test_an_iteration_has_its_own_lambda_and_learning_rate_and_the_others_the_shared_ones() -> None:
    params, _ = params_file.resolve(
        WORKSPACE, DEMO, ["iterations.2.lambda=5.0", "iterations.3.learning_rate=1e-7", "training.learning_rate=2e-7"]
    )
    assert [params.objective_at(t).lambda_ for t in (1, 2, 3, 4)] == [0.1, 5.0, 0.1, 0.1]
    assert [params.training_at(t).learning_rate for t in (1, 2, 3, 4)] == [2e-7, 2e-7, 1e-7, 2e-7]
    assert params.training_at(3).optim == params.training.optim
    assert params.objective_at(2).eta == params.objective.eta


def test_the_digest_depends_on_values_and_on_nothing_else(tmp_path: Path) -> None:
    params = params_file.load(Path(DEMO))
    turned = tmp_path / "params.yaml"
    turned.write_text("iterations: {'1': {previous: 0}, '2': {previous: 1}, '3': {previous: 2}, '4': {previous: 3}}\n")
    turned.write_text(turned.read_text() + Path(DEMO).read_text().split("iterations:")[0] + "# a comment\n")
    assert params_file.load(turned).digest() == params.digest()
    assert params_file.resolve(WORKSPACE, DEMO, ["seed=43"])[0].digest() != params.digest()


def test_what_is_off_by_default_and_where_it_runs_count_in_no_digest() -> None:
    plain = params_file.load(Path(DEMO))
    assert plain.lora is None
    tree = plain.model_dump(by_alias=True)
    del tree["lora"], tree["model"]["base"], tree["machine"]
    for section in (tree["sft"], tree["training"]):
        del section["sharded"], section["cpu_offload"]
    assert plain.digest() == files.digest(tree)
    assert plain.model_copy(update={"lora": Lora()}).digest() != plain.digest()
    assert plain.model_copy(update={"machine": Machine(processes=8)}).digest() == plain.digest()
    divided = plain.training.model_copy(update={"sharded": True})
    assert plain.model_copy(update={"training": divided}).digest() != plain.digest()


def test_the_batch_sizes_of_earlier_versions_are_their_product(tmp_path: Path) -> None:
    old = Path(DEMO).read_text().replace("train_batch_size: 32", "per_device_train_batch_size: 4", 1)
    path = tmp_path / "old.yaml"
    path.write_text(old.replace("  learning_rate", "  gradient_accumulation_steps: 8\n  learning_rate", 1))
    assert params_file.load(path) == params_file.load(Path(DEMO))
    assert params_file.resolve(WORKSPACE, str(path))[1].count("train_batch_size: 32") == 2
    assert params_file.resolve(WORKSPACE, str(path), ["sft.train_batch_size=8"])[0].sft.train_batch_size == 8
    with pytest.raises(TpawError, match="set train_batch_size, which replaces per_device_train_batch_size x gradient"):
        params_file.resolve(WORKSPACE, str(path), ["sft.per_device_train_batch_size=8"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.sharded=true"], "training.sharded: needs several processes; set machine.processes to 2 or more"),
        (["sft.sharded=true", "machine.processes=2"], "sft.sharded: a model from scratch is small enough"),
        (["training.cpu_offload=true"], "cpu_offload: works on a sharded model; set sharded=true as well"),
        (
            ["machine.launch=srun", "training.bf16=auto"],
            "training.bf16: auto picks the precision that is faster here, but machine.launch may start",
        ),
        (["machine.nodes=2"], "launch: name what starts processes on several nodes"),
        (["machine.processes=3", "machine.tensor_parallel=2"], "tensor_parallel: must divide processes, which is 3"),
        (["machine.processes=2", "machine.tensor_parallel=2"], "machine.tensor_parallel: only vllm divides a model"),
        (
            ["machine.processes=2", "training.sharded=true", "training.optim=paged_adamw_8bit"],
            "optim: paged_adamw_8bit does not work on a sharded model; use adamw_torch, rmsprop or adamw_torch_8bit",
        ),
    ],
)
def test_a_machine_that_cannot_run_it_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(TpawError, match=re.escape(message)):
        params_file.resolve(WORKSPACE, "demo", overrides)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("lora.r=0", "lora.r"),
        ("lora.alpha=-1", "lora.alpha"),
        ("lora.dropout=1", "lora.dropout"),
        ("lora.target_modules=[]", "lora.target_modules"),
        ("lora.rank=8", "lora.rank"),
    ],
)
def test_a_wrong_value_of_lora_is_refused_by_its_key(override: str, key: str) -> None:
    with pytest.raises(TpawError, match=re.escape(key)):
        params_file.resolve(WORKSPACE, "demo", [override])


def test_one_key_of_lora_switches_it_on_and_the_others_are_written_out() -> None:
    params, text = params_file.resolve(WORKSPACE, "demo", ["lora.r=8", "lora.target_modules=[q_proj, v_proj]"])
    assert params.lora == Lora(r=8, target_modules=["q_proj", "v_proj"])
    assert "alpha: 32.0\n" in text
    assert params.checkpoint_dtype == "bfloat16"
    assert params_file.resolve(WORKSPACE, "demo", ["lora.r=8", "lora=null"])[0].lora is None
