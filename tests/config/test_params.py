from __future__ import annotations

import re
from pathlib import Path

import pytest

from tpaw_core.config import params_file
from tpaw_core.errors import TpawError
from tpaw_core.workspace import files

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
DEMO = str(ROOT / "recipes" / "demo.yaml")


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
        ("evaluation.tasks=[heldout, validation]", "data.validation_rows: evaluation.tasks names validation"),
        ("team.size=0", "team.size: Input should be greater than or equal to 1, got 0"),
        ("generation.temperature=-1", "generation.temperature: Input should be greater than or equal to 0"),
        ("generation.top_p=0", "generation.top_p: Input should be greater than 0"),
        ("generation.top_p=1.1", "generation.top_p: Input should be less than or equal to 1"),
        ("generation.backend=sglang", "generation.backend: Input should be 'transformers' or 'vllm'"),
        ("data.max_skipped=2", "data.max_skipped: Input should be less than or equal to 1"),
        ("model.max_length=0", "model.max_length: Input should be greater than or equal to 1"),
        ("model.dtype=float16", "model.dtype: Input should be 'auto', 'float32' or 'bfloat16'"),
        ("training.learning_rate=0", "training.learning_rate: Input should be greater than 0"),
        ("training.learning_rate=.inf", "training.learning_rate"),
        ("training.per_device_train_batch_size=0", "per_device_train_batch_size: Input should be greater"),
        ("evaluation.answer_pattern='#### ('", "evaluation.answer_pattern"),
        # values that do not agree with each other
        ("training.save_steps=15", "save_steps: must be a multiple of logging_steps (10)"),
        ("objective.name=spin", "team.players: objective.name=spin has one player; set team.players=1"),
        ("evaluation.primary=gsm8k", "evaluation.primary: 'gsm8k' is not in evaluation.tasks"),
        ("model.scratch=null", "model: give model_name_or_path, or scratch"),
        ("sft.enabled=false", "sft.enabled: a model from scratch knows nothing"),
        ("iterations={}", "iterations: Dictionary should have at least 1 item"),
        ("iterations.1.previous=3", "iterations.1: write '1': {previous: 0} here"),
        ("iterations.6.previous=5", "iterations.6: write '5': {previous: 4} here"),
        # missing sections and keys
        ("training=null", "training: Input should be a valid dictionary"),
        ("training={num_train_epochs: 1}", "'training.learning_rate' is missing; add it"),
        ("data={max_train_rows: 1}", "'data.path' is missing; add it"),
        # overrides that cannot be read
        ("objective.eta", "override 'objective.eta': write it as section.key=value"),
        ("=3", "override '=3': write it as section.key=value"),
        ("seed.deep=3", "override 'seed.deep=3': 'deep' lies inside a value, not a section"),
        ("seed.very.deep=3", "override 'seed.very.deep=3': 'very' lies inside a value, not a section"),
        ("objective.eta=[1", "override 'objective.eta=[1': not valid YAML"),
        # YAML that is no JSON
        ("recipe=2026-05-09", "recipe"),
    ],
)
def test_a_bad_parameter_is_refused_by_a_message_that_names_it(override: str, message: str) -> None:
    with pytest.raises(TpawError, match=re.escape(message)):
        params_file.resolve(DEMO, [override])


def test_every_bad_parameter_has_its_own_line() -> None:
    with pytest.raises(TpawError) as caught:
        params_file.resolve(DEMO, ["objective.eta=0", "team.size=0", "seeed=1"])
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert all(line.startswith(f"{DEMO}: ") for line in lines)


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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"recipe: [demo", "not valid YAML"),
        (b"a: 1\na: 2\n", "not valid YAML"),
        (b"\xff\xfe\x00", "not valid YAML"),
        (b"- a\n- b\n", "expected a mapping of sections, found CommentedSeq"),
        (b"just words\n", "expected a mapping of sections, found str"),
        (b"", "expected a mapping of sections, found NoneType"),
    ],
)
def test_a_file_that_is_no_yaml_mapping_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    with pytest.raises(TpawError, match=f"{path}: {message}"):
        params_file.load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TpawError, match=r"params\.yaml: no such file; run from the project's folder"):
        params_file.load(tmp_path / "params.yaml")


def test_an_unknown_recipe_names_the_near_match(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(TpawError, match=r"recipe 'dmo': no such recipe \(did you mean 'demo'\?\); there are: .*demo"):
        params_file.resolve("dmo")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_and_the_text_written_for_it_say_the_same(recipe: Path, tmp_path: Path) -> None:
    params, text = params_file.resolve(str(recipe))
    assert params.recipe == recipe.stem
    assert params == params_file.load(recipe)
    written = tmp_path / "params.yaml"
    written.write_text(text)
    assert params_file.load(written) == params
    again, same_text = params_file.resolve(None, path=written)
    assert again == params
    assert same_text == text
    assert again.digest() == params.digest()


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("objective.eta=4", ("objective", "eta"), 4.0),
        ("objective.lambda=0.2", ("objective", "lambda_"), 0.2),
        ("training.learning_rate=1e-6", ("training", "learning_rate"), 1e-6),
        ("generation.top_p=0.9", ("generation", "top_p"), 0.9),
        ("team.exclude=[1, abcdef01]", ("team", "exclude"), [1, "abcdef01"]),
        ("model.model_name_or_path=some/model", ("model", "model_name_or_path"), "some/model"),
        ("evaluation.answer_pattern='a=b.c'", ("evaluation", "answer_pattern"), "a=b.c"),
        ("seed=7", ("seed",), 7),
    ],
)
def test_an_override_changes_its_key_alone_and_is_written(
    override: str, path: tuple[str, ...], value: object, tmp_path: Path
) -> None:
    params, text = params_file.resolve(DEMO, [override])
    *parents, last = path
    node, before = params, params_file.load(Path(DEMO))
    for parent in parents:
        node, before = getattr(node, parent), getattr(before, parent)
    assert getattr(node, last) == value
    assert node.model_copy(update={last: getattr(before, last)}) == before
    (tmp_path / "params.yaml").write_text(text)
    assert params_file.load(tmp_path / "params.yaml") == params


def test_a_later_override_wins() -> None:
    assert params_file.resolve(DEMO, ["seed=1", "seed=2"])[0].seed == 2


def test_comments_of_the_recipe_survive_an_override() -> None:
    assert "# the paper's" in params_file.resolve(DEMO, ["objective.eta=4"])[1]


@pytest.mark.parametrize(("asked", "expected"), [(None, 4), (1, 4), (4, 4), (7, 7)])
def test_iterations_are_lengthened_and_never_shortened(asked: int | None, expected: int, tmp_path: Path) -> None:
    params, text = params_file.resolve(DEMO, [], asked)
    assert list(params.iterations) == [str(t) for t in range(1, expected + 1)]
    assert [entry.previous for entry in params.iterations.values()] == list(range(expected))
    (tmp_path / "params.yaml").write_text(text)
    assert params_file.load(tmp_path / "params.yaml") == params


def test_a_new_iteration_goes_on_with_the_settings_of_the_last() -> None:
    params, _ = params_file.resolve(DEMO, ["iterations.4.lambda=5", "iterations.4.learning_rate=1e-7"], 5)
    assert params.objective_at(5).lambda_ == 5.0
    assert params.training_at(5).learning_rate == 1e-7


def test_an_iteration_has_its_own_lambda_and_learning_rate_and_the_others_the_shared_ones() -> None:
    params, _ = params_file.resolve(
        DEMO, ["iterations.2.lambda=5.0", "iterations.3.learning_rate=1e-7", "training.learning_rate=2e-7"]
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
    assert params_file.resolve(DEMO, ["seed=43"])[0].digest() != params.digest()
    assert files.digest({"b": [1, "é"], "a": None}) == files.digest({"a": None, "b": [1, "é"]})
    # sha256 of {"a":1}
    assert files.digest({"a": 1}) == "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"
