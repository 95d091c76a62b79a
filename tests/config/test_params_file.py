from __future__ import annotations

import re
from pathlib import Path

import pytest

from tpaw_core.config import params_file
from tpaw_core.errors import TpawError
from tpaw_core.workspace.paths import Workspace

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
DEMO = str(ROOT / "recipes" / "demo.yaml")
WORKSPACE = Workspace(ROOT)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.eta", "override 'objective.eta': write it as section.key=value"),
        ("=3", "override '=3': write it as section.key=value"),
        ("seed.deep=3", "override 'seed.deep=3': 'deep' is nested under a plain value, not a section"),
        ("seed.very.deep=3", "override 'seed.very.deep=3': 'very' is nested under a plain value, not a section"),
        ("objective.eta=[1", "override 'objective.eta=[1': not valid YAML"),
        # YAML that is not JSON
        ("seed=2026-05-09", "contains a value of an unsupported type (Object of type date"),
        ("seed=[]:", "contains a value of an unsupported type"),
        ("iterations=['1', '2']", "iterations: Input should be a valid dictionary"),
        ("iterations.1=[1]", "iterations.1: Input should be a valid dictionary"),
    ],
)
def test_an_override_that_cannot_be_read_is_refused(override: str, message: str) -> None:
    with pytest.raises(TpawError, match=re.escape(message)):
        params_file.resolve(WORKSPACE, DEMO, [override])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"recipe: [demo", "not valid YAML"),
        (b"a: 1\na: 2\n", "not valid YAML"),
        (b"\xff\xfe\x00", "not valid YAML"),
        (b"- a\n- b\n", "expected a mapping of sections, found CommentedSeq"),
        (b"seed: !!timestamp x", "not valid YAML"),
        (b"!<tag> seed: 1", "contains a value of an unsupported type"),
        (b"? [seed]\n: 1", "contains a value of an unsupported type"),
        (b"seed: &it [*it]", "(.|\n)*seed: Input should be a valid integer"),
        (b"seed: " + b"[" * 100 + b"]" * 100, "(.|\n)*seed: Input should be a valid integer"),
        (b"just words\n", "expected a mapping of sections, found str"),
        (b"", "expected a mapping of sections, found NoneType"),
    ],
)
def test_a_file_that_holds_something_else_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    with pytest.raises(TpawError, match=f"{path}: {message}"):
        params_file.load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TpawError, match=r"params\.yaml: no such file; run this from the project's folder"):
        params_file.load(tmp_path / "params.yaml")


def test_an_unknown_recipe_names_the_near_match() -> None:
    with pytest.raises(TpawError, match=r"recipe 'dmo': no such recipe \(did you mean 'demo'\?\); available: .*demo"):
        params_file.resolve(WORKSPACE, "dmo")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_and_the_text_written_for_it_say_the_same(recipe: Path, workspace: Workspace) -> None:
    params, text = params_file.resolve(workspace, str(recipe))
    assert params.recipe == recipe.stem
    assert params == params_file.load(recipe)
    workspace.params_file.write_text(text)
    assert params_file.load(workspace.params_file) == params
    again, same_text = params_file.resolve(workspace, None)
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
    params, text = params_file.resolve(WORKSPACE, DEMO, [override])
    *parents, last = path
    node, before = params, params_file.load(Path(DEMO))
    for parent in parents:
        node, before = getattr(node, parent), getattr(before, parent)
    assert getattr(node, last) == value
    assert node.model_copy(update={last: getattr(before, last)}) == before
    (tmp_path / "params.yaml").write_text(text)
    assert params_file.load(tmp_path / "params.yaml") == params


def test_a_later_override_wins() -> None:
    assert params_file.resolve(WORKSPACE, DEMO, ["seed=1", "seed=2"])[0].seed == 2


def test_comments_of_the_recipe_survive_an_override() -> None:
    assert "# paper" in params_file.resolve(WORKSPACE, DEMO, ["objective.eta=4"])[1]


@pytest.mark.parametrize(("asked", "expected"), [(None, 4), (1, 4), (4, 4), (7, 7)])
def test_iterations_are_lengthened_and_never_shortened(asked: int | None, expected: int, tmp_path: Path) -> None:
    params, text = params_file.resolve(WORKSPACE, DEMO, [], asked)
    assert list(params.iterations) == [str(t) for t in range(1, expected + 1)]
    assert [entry.previous for entry in params.iterations.values()] == list(range(expected))
    (tmp_path / "params.yaml").write_text(text)
    assert params_file.load(tmp_path / "params.yaml") == params


def test_switching_writes_params_yaml_only_where_that_changes_it(workspace: Workspace) -> None:
    params = params_file.switch(workspace, DEMO, ["seed=7"])
    assert params_file.load(workspace.params_file) == params
    before = workspace.params_file.stat()
    assert params_file.switch(workspace, None) == params
    assert workspace.params_file.stat() == before
    assert params_file.switch(workspace, None, ["seed=8"]).seed == 8
    assert params_file.load(workspace.params_file).seed == 8


def test_a_recipe_is_found_by_name_or_path_from_where_the_user_is(tmp_path: Path) -> None:
    """A study's workspaces lie elsewhere; `source` is where relative paths start."""
    (tmp_path / "own.yml").write_text(Path(DEMO).read_text().replace("recipe: demo", "recipe: own"))
    assert params_file.resolve(WORKSPACE, "demo")[0].recipe == "demo"
    assert params_file.resolve(Workspace(ROOT, source=tmp_path), "own.yml")[0].recipe == "own"
    with pytest.raises(TpawError, match=r"recipe 'own\.yml': no such recipe"):
        params_file.resolve(WORKSPACE, "own.yml")


TEMPLATE = "{% for m in messages %}{{ m['content'] }}é{% endfor %}"


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_file_with_a_chat_template_is_read_for_its_text(mark: bytes, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_bytes(mark + TEMPLATE.encode())
    params, text = params_file.resolve(Workspace(tmp_path), str(DEMO), ["model.chat_template=own.jinja"])
    assert params.model.chat_template == TEMPLATE
    assert "own.jinja" not in text
    assert params_file.read_template(Workspace(tmp_path), "own.jinja") == TEMPLATE
    assert params_file.read_template(Workspace(tmp_path), TEMPLATE * 1000) == TEMPLATE * 1000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "contains no Jinja template"),
        (b"You are a helper.", "contains no Jinja template"),
        ("{{ é }}".encode("latin-1"), "is not a UTF-8 text file"),
        (None, "is not a UTF-8 text file"),
    ],
)
def test_a_file_that_holds_no_chat_template_is_refused(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(TpawError, match=rf"own\.jinja: {message}"):
        params_file.resolve(Workspace(tmp_path), str(DEMO), ["model.chat_template=own.jinja"])
