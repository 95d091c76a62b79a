"""LoRA through all stages, in this process: on a model from scratch, on a base, and from an adapter made elsewhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.workspace import ROOT, TINY
from tpaw_core.artifacts import adapters, checkpoint
from tpaw_core.artifacts.encoded import read_encoding
from tpaw_core.artifacts.metrics import read_metrics
from tpaw_core.artifacts.training_log import read_log
from tpaw_core.artifacts.weights import scored_in
from tpaw_core.config import params_file
from tpaw_core.engine import scoring
from tpaw_core.engine.training.dropout import without_dropout
from tpaw_core.errors import TpawError
from tpaw_core.launch.source import Source
from tpaw_core.stages import members
from tpaw_core.stages.check import check
from tpaw_core.stages.context import Context
from tpaw_core.stages.data import data
from tpaw_core.stages.encode import encode
from tpaw_core.stages.evaluate import evaluate
from tpaw_core.stages.generate import generate
from tpaw_core.stages.sft import sft
from tpaw_core.stages.team import team
from tpaw_core.stages.train import train
from tpaw_core.stages.weights import weights
from tpaw_core.upkeep import lineage, verify
from tpaw_core.upkeep.export import export
from tpaw_core.workspace.paths import Workspace

pytestmark = pytest.mark.slow
LORA = ["lora.r=4", "lora.alpha=8", "lora.dropout=0.1", "training.learning_rate=3e-3", "sft.num_train_epochs=1"]
PLAY: list[Callable[[Context, int], Any]] = [generate, team, weights, train, evaluate]


def context(folder: Path, *overrides: str) -> Context:
    workspace = Workspace(folder)
    if not workspace.recipes.exists():
        folder.mkdir(parents=True, exist_ok=True)
        workspace.recipes.symlink_to(ROOT / "recipes")
    return Context(workspace, params_file.switch(workspace, "demo", [*TINY, *LORA, *overrides]))


def run(made: Context, iterations: int) -> None:
    check(made)
    data(made)
    encode(made)
    sft(made)
    for iteration in range(1, iterations + 1):
        for stage in PLAY:
            stage(made, iteration)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Context:
    """Two iterations of a model from scratch."""
    made = context(tmp_path_factory.mktemp("scratch"))
    run(made, 2)
    return made


@pytest.fixture(scope="module")
def base(scratch: Context, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as others publish it, in float32."""
    folder = tmp_path_factory.mktemp("published") / "base"
    model = checkpoint.load_model(scratch.workspace.checkpoint(0), dtype="float32")
    torch.manual_seed(0)
    with torch.no_grad():  # not what bfloat16 holds
        for parameter in model.parameters():
            parameter *= 1 + 1e-4 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    checkpoint.load_tokenizer(scratch.workspace.tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def on_base(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Context:
    """SFT of an adapter on it, and an iteration."""
    made = context(tmp_path_factory.mktemp("own"), f"model.model_name_or_path={base}")
    run(made, 1)
    return made


@pytest.fixture
def copied(on_base: Context, tmp_path: Path) -> Callable[..., Context]:
    """The same workspace elsewhere, with other parameters."""

    def make(*overrides: str) -> Context:
        shutil.copytree(on_base.workspace.root, tmp_path / "copy", symlinks=True)
        name = on_base.params.model.model_name_or_path
        return context(tmp_path / "copy", f"model.model_name_or_path={name}", *overrides)

    return make


def test_from_scratch_checkpoint_0_is_the_base_in_bfloat16_and_the_others_are_adapters_on_it(scratch: Context) -> None:
    workspace = scratch.workspace
    whole = checkpoint.verify(workspace, 0)
    assert whole.base is None
    values = load_file(workspace.checkpoint(0) / "model.safetensors").values()
    assert {value.dtype for value in values} == {torch.bfloat16}
    for iteration in (1, 2):
        manifest = checkpoint.verify(workspace, iteration)
        assert manifest.base == checkpoint.Base(source="checkpoints/0", revision=None, digest=whole.digest)
        assert {adapters.CONFIG, adapters.WEIGHTS} <= set(manifest.files)
        assert "model.safetensors" not in manifest.files
    first, second = (load_file(workspace.checkpoint(t) / adapters.WEIGHTS) for t in (1, 2))
    assert all((first[name] != second[name]).any() for name in first if "lora_B" in name)
    assert read_metrics(workspace, 2).checkpoint == checkpoint.manifest(workspace, 2).digest
    assert scored_in(workspace.weights(1)) == "bfloat16_base"


@pytest.mark.parametrize("iteration", [1, 2])
def test_the_first_reward_of_an_iteration_is_exactly_0(scratch: Context, iteration: int) -> None:
    first, *_, last = read_log(scratch.workspace, iteration)
    assert first["step"] == 1
    assert first["players/0/rewards/chosen"] == 0.0
    assert last["players/0/rewards/chosen"] != 0.0


def test_a_member_is_scored_as_it_is_trained_to_the_bit(scratch: Context) -> None:
    """By switching adapters in any order, and by one loaded afresh to go on from it."""
    workspace, pad_id = scratch.workspace, read_encoding(scratch.workspace).pad_id
    pairs = [([5, 6, 7], [8, 9, 10]), ([5, 6, 7], [11]), ([12], [13, 14])]
    players = members.Members(scratch, "bfloat16")
    found: dict[int, list[list[float]]] = {0: [], 1: [], 2: []}
    for iteration in (2, 0, 1, 2, 1, 0):
        found[iteration].append(scoring.score(players.load(iteration), pairs, pad_id=pad_id))
    for iteration, (one, other) in found.items():
        policy = members.Members(scratch, "bfloat16").load(iteration)
        assert one == other == scoring.score(policy, pairs, pad_id=pad_id)
        with without_dropout(policy):
            policy.train()
            assert one == scoring.score(policy, pairs, pad_id=pad_id)
    assert players.load(0) is players.load(2)
    assert found[0] != found[1] != found[2]
    assert workspace.scores.exists()


def test_an_adapter_on_a_published_base_is_a_member_from_checkpoint_0_on(on_base: Context, base: Path) -> None:
    workspace = on_base.workspace
    expected = checkpoint.Base(source=str(base), revision=None, digest=checkpoint.base_digest(workspace, base))
    assert [checkpoint.verify(workspace, t).base for t in (0, 1)] == [expected, expected]
    manifest = checkpoint.manifest(workspace, 0)
    assert manifest.made_from[str(base)] == expected.digest
    assert manifest.params["lora"]["r"] == 4
    trained = load_file(workspace.checkpoint(0) / adapters.WEIGHTS)
    assert all(value.any() for value in trained.values()), "SFT has trained it"
    assert f"an adapter on: {base}" in lineage.text(workspace, 1)
    assert verify.check(on_base).disagreements == []
    other = manifest.model_copy(update={"base": expected.model_copy(update={"digest": "0" * 64})})
    path = workspace.checkpoint(0) / checkpoint.MANIFEST
    before = path.read_text()
    path.write_text(other.text())
    with pytest.raises(TpawError, match="is damaged"):  # the digest covers the base's
        checkpoint.manifest(workspace, 0)
    path.write_text(before)


def test_a_trained_model_that_is_not_fine_tuned_starts_with_an_adapter_that_does_nothing(
    base: Path, tmp_path: Path
) -> None:
    made = context(tmp_path / "ready", f"model.model_name_or_path={base}", "sft.enabled=false")
    run(made, 0)
    weights = load_file(made.workspace.checkpoint(0) / adapters.WEIGHTS)
    assert not any(value.any() for name, value in weights.items() if "lora_B" in name)
    loaded, plain = members.Members(made, "float32").load(0), Source(str(base)).load_base()
    ids = torch.tensor([[3, 1, 4]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, plain(ids).logits)


def test_an_exported_member_is_a_plain_model_with_its_log_probabilities(on_base: Context, tmp_path: Path) -> None:
    pad_id = read_encoding(on_base.workspace).pad_id
    pairs = [([5, 6, 7], [8, 9, 10]), ([12], [13, 14])]
    export(on_base, 1, tmp_path / "merged")
    merged = checkpoint.load_model(tmp_path / "merged")
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    expected = scoring.score(members.Members(on_base, "float32").load(1), pairs, pad_id=pad_id)
    assert scoring.score(merged, pairs, pad_id=pad_id) == pytest.approx(expected, abs=1e-4)
    assert checkpoint.load_tokenizer(tmp_path / "merged").chat_template
    assert not (tmp_path / "merged" / adapters.CONFIG).exists()
    with pytest.raises(TpawError, match="already exists"):
        export(on_base, 1, tmp_path / "merged")


def test_a_whole_checkpoint_is_not_exported(scratch: Context, tmp_path: Path) -> None:
    with pytest.raises(TpawError, match="is already a whole model"):
        export(scratch, 0, tmp_path / "merged")


def test_without_lora_an_adapter_is_not_gone_on_from(copied: Callable[..., Context]) -> None:
    made = copied("lora=null")
    for stage, iteration in ((generate, 1), (evaluate, 0), (weights, 1), (train, 1)):
        with pytest.raises(
            TpawError,
            match=r"is a LoRA adapter, but lora is null.*lora.r=4|_base \(for LoRA\), but lora is null.*; recreate it",
        ):
            stage(made, iteration)


def test_another_shape_is_refused_before_training(copied: Callable[..., Context]) -> None:
    with pytest.raises(TpawError, match=r"has r=4 and alpha=8, not lora.r=8 and lora.alpha=8"):
        train(copied("lora.r=8"), 1)


def test_a_base_that_was_moved_is_found_where_model_base_says_by_its_digest(
    copied: Callable[..., Context], base: Path, tmp_path: Path
) -> None:
    gone = base.rename(base.with_name("gone"))
    try:
        made = copied()
        with pytest.raises(
            TpawError, match=rf"the base of the adapters, {base} .* was not found.*set model\.base to the folder"
        ):
            generate(made, 1)
        assert any("was not found" in line for line in verify.check(made).disagreements)
        moved = shutil.copytree(gone, tmp_path / "moved")
        made = Context(made.workspace, params_file.switch(made.workspace, None, [f"model.base={moved}"]))
        generate(made, 1)
        assert verify.check(made).disagreements == []
        config = json.loads((moved / "config.json").read_text())
        (moved / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-2}))
        with pytest.raises(TpawError, match=rf"{moved}: is another model"):
            generate(made, 1)
    finally:
        gone.rename(base)


@pytest.fixture
def elsewhere(base: Path, tmp_path: Path) -> Path:
    """An adapter as PEFT saves it and axolotl lays it out: beside it a config, a tokenizer, and states of training."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path / "outputs"
    model = checkpoint.load_model(base, dtype="bfloat16")
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"]))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    wrapped.save_pretrained(folder)
    checkpoint.load_model(base).config.save_pretrained(folder)
    checkpoint.load_tokenizer(base).save_pretrained(folder)
    (folder / "checkpoint-3").mkdir()
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n")
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        torch.save(wrapped(ids).logits, tmp_path / "logits.pt")
    return folder


@pytest.mark.parametrize("fine_tuned", [True, False])
def test_an_adapter_made_elsewhere_is_checkpoint_0_or_what_sft_goes_on_from(
    elsewhere: Path, base: Path, tmp_path: Path, fine_tuned: bool
) -> None:
    options = [f"model.model_name_or_path={elsewhere}", f"sft.enabled={str(not fine_tuned).lower()}"]
    made = context(tmp_path / "run", *options)
    run(made, 1)
    manifest = checkpoint.verify(made.workspace, 0)
    assert manifest.base is not None
    assert manifest.base.digest == checkpoint.base_digest(made.workspace, base)
    assert str(elsewhere / adapters.WEIGHTS) in manifest.made_from
    given, ours = (load_file(folder / adapters.WEIGHTS) for folder in (elsewhere, made.workspace.checkpoint(0)))
    assert given.keys() == ours.keys()
    same = all(torch.equal(given[name].float(), ours[name]) for name in given)
    assert same == fine_tuned
    if fine_tuned:
        with torch.no_grad():
            logits = members.Members(made, "bfloat16").load(0)(torch.tensor([[3, 1, 4, 1, 5]])).logits
        assert torch.equal(logits, torch.load(tmp_path / "logits.pt"))
    assert read_log(made.workspace, 1)[0]["players/0/rewards/chosen"] == 0.0


def test_its_base_is_asked_for_where_it_names_none_that_is_here(elsewhere: Path, base: Path, tmp_path: Path) -> None:
    path = elsewhere / adapters.CONFIG
    named = json.loads(path.read_text())
    for name, reason in ((None, "does not say what its base is"), ("/far/away", "is not at /far/away")):
        path.write_text(json.dumps({**named, "base_model_name_or_path": name}))
        with pytest.raises(TpawError, match=rf"{reason}.*set model\.base to"):
            check(context(tmp_path / "run", f"model.model_name_or_path={elsewhere}"))
    run(context(tmp_path / "run", f"model.model_name_or_path={elsewhere}", f"model.base={base}"), 0)


def test_check_names_what_lora_would_refuse(elsewhere: Path, base: Path, tmp_path: Path) -> None:
    for overrides, reason in (
        ([f"model.model_name_or_path={elsewhere}", "lora.r=16"], r"set lora\.r=4 lora\.alpha=8"),
        (
            [f"model.model_name_or_path={elsewhere}", "lora=null"],
            r"set lora\.r and lora\.alpha to continue training it",
        ),
        ([f"model.model_name_or_path={base}", "lora.target_modules=[lm_head]"], "the output projection; leave them"),
        ([f"model.model_name_or_path={base}", "lora.target_modules=nothing"], r"lora\.target_modules=nothing: "),
        ([f"model.model_name_or_path={base}", "generation.backend=vllm"], r"set generation\.dtype=bfloat16"),
    ):
        with pytest.raises(TpawError, match=reason):
            check(context(tmp_path / "run", *overrides))


def test_check_finds_an_adapter_that_does_not_fit_and_counts_what_it_has(
    elsewhere: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = context(tmp_path / "run", f"model.model_name_or_path={elsewhere}")
    check(made)
    weights = load_file(elsewhere / adapters.WEIGHTS)
    own = sum(value.numel() for value in weights.values())
    assert f"disk: {2 * 5 * 4 * own / 1e3:.1f} kB for all iterations" in caplog.text
    name = next(iter(weights))
    save_file({**weights, name: weights[name][:, :-1].contiguous()}, elsewhere / adapters.WEIGHTS)
    with pytest.raises(TpawError, match=r"this adapter does not fit its base"):
        check(made)


def test_a_server_gets_the_base_and_the_adapter_or_is_refused(on_base: Context, base: Path, scratch: Context) -> None:
    workspace = on_base.workspace
    found = members.Members(on_base, "bfloat16").served(1)
    assert found == (str(base), (workspace.checkpoint(1), 4))
    with pytest.raises(TpawError, match=r"is stored in float32.*set generation\.dtype=bfloat16"):
        members.Members(on_base, "float32").served(1)
    assert members.Members(scratch, "float32").served(0) == (str(scratch.workspace.checkpoint(0)), None)
    assert members.Members(scratch, "float32").served(2)[0] == str(scratch.workspace.checkpoint(0))
    whole = Context(workspace, on_base.params.model_copy(update={"lora": None}))
    with pytest.raises(TpawError, match="is a LoRA adapter, but lora is null"):
        members.Members(whole, "bfloat16").served(1)


def test_check_counts_a_base_in_bfloat16_and_states_of_the_adapter_alone(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = context(tmp_path / "run", f"model.model_name_or_path={base}")
    check(made)
    model = checkpoint.load_model(base)
    adapter = adapters.parameters(model, made.params.lora)  # type: ignore[arg-type]
    weights = 2 * model.num_parameters() + 4 * adapter
    parts = f"weights {weights / 1e3:.1f} kB, gradients {4 * adapter / 1e3:.1f} kB, states {8 * adapter / 1e3:.1f} kB"
    assert caplog.text.count(parts) == 2  # in sft and in training
    assert f"disk: {2 * 5 * 4 * adapter / 1e3:.1f} kB for all iterations" in caplog.text
