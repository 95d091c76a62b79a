"""LoRA adapters on a base model in memory: new ones, reading, switching, writing, merging. Alone in knowing PEFT.

A base is in bfloat16 and frozen, its adapters are float32. An adapter's files are those that PEFT reads, except that
they do not say where the base is: a manifest does, by the base's digest.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import TypeAdapter

from tpaw_core.config.params import Lora
from tpaw_core.errors import TpawError

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every name in WEIGHTS
# What an adapter may not have: not LoRA on linear layers alone, so that neither merging nor vllm would be right.
OTHER_KINDS = (
    "modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication", "use_dora", "use_qalora",
    "use_bdlora", "lora_bias", "alora_invocation_tokens", "arrow_config", "kasa_config", "velora_config",
    "monteclora_config",
)  # fmt: skip


def attach(model: PreTrainedModel, settings: Lora, seed: int) -> None:
    """A new adapter on a frozen base: the model computes what it did before, as B is 0.

    Raises TpawError where ``settings`` do not fit the model.
    """
    from peft import LoraConfig
    from transformers import set_seed

    set_seed(seed)
    targets = settings.target_modules
    alpha: Any = round(settings.alpha) if settings.alpha % 1 == 0 else settings.alpha  # PEFT takes fractions as well
    config = LoraConfig(
        r=settings.r,
        lora_alpha=alpha,
        lora_dropout=settings.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    try:
        _add(model, config, "default")
    except (ValueError, TypeError) as error:  # no module of this name, one that LoRA does not know
        raise TpawError(f"lora.target_modules={settings.target_modules}: {str(error).splitlines()[0]}") from None


def parameters(model: PreTrainedModel, settings: Lora, folder: Path | None = None) -> int:
    """How many the adapter has that ``model`` has, or would have: that in ``folder``, or a new one. Computes none.

    Raises TpawError where the adapter does not fit.
    """
    if active(model) is None:
        model = copy.deepcopy(model).to(torch.device("meta"))  # type: ignore[arg-type]
        if folder is None:
            attach(model, settings, seed=0)
        else:
            read(model, folder)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def use(model: PreTrainedModel, folder: Path | None, name: str) -> None:
    """Make the adapter in ``folder``, from now on known by ``name``, the one that ``model`` computes with.

    None: the base alone. Adapters stay in memory, so that switching back reads nothing.
    """
    known: Any = getattr(model, "peft_config", {})
    if folder is None:
        if known:
            model.disable_adapters()
        return
    if name not in known:
        read(model, folder, name)
    model.set_adapter(name)
    model.enable_adapters()


def read(model: PreTrainedModel, folder: Path, name: str = "default") -> None:
    """Put the adapter in ``folder`` on its base, in evaluation mode. Raises TpawError where it does not fit."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    config = read_config(folder)
    try:
        _add(model, config, name)
        weights = {key.removeprefix(PREFIX): value for key, value in load_file(folder / WEIGHTS).items()}
        if left := weights.keys() ^ _state(model, name).keys():
            raise ValueError(f"{len(left)} weights are missing or belong to no layer: {', '.join(sorted(left)[:3])}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nothing is copied where a model is asked for its sizes alone
            set_peft_model_state_dict(model, weights, adapter_name=name)
    except TpawError:
        raise
    except Exception as error:  # of safetensors, PEFT or torch: a damaged file, another shape
        raise TpawError(
            f"{folder}: this adapter does not fit its base ({' '.join(str(error).split())[:300]})"
        ) from None


def read_config(folder: Path) -> LoraConfig:
    """Raises TpawError for what is not LoRA on linear layers, in safetensors."""
    from peft import LoraConfig

    try:
        given = dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
        known = LoraConfig.__dataclass_fields__
        reason = next(_reasons(given, sorted(given.keys() - known.keys())), None)
        config = None if reason else LoraConfig(**{name: given[name] for name in given if name in known})
        if config is not None:  # PEFT does not look at types
            own = {"r": config.r, "alpha": config.lora_alpha, "dropout": config.lora_dropout}
            Lora.model_validate({**own, "target_modules": given["target_modules"]}, strict=True)
            TypeAdapter(str | None).validate_python(config.base_model_name_or_path, strict=True)
    except Exception as error:  # PEFT has many for a broken config
        told = " ".join(str(error).split())[:300]
        raise TpawError(f"{folder / CONFIG}: is damaged ({told}); copy the adapter again") from None
    if config is None:
        raise TpawError(f"{folder}: {reason}")
    if not (folder / WEIGHTS).is_file():
        raise TpawError(f"{folder / WEIGHTS}: does not exist; save the adapter as safetensors")
    return config


def rank(folder: Path) -> int:
    """The largest of its layers' ranks."""
    config = read_config(folder)
    return max([config.r, *(config.rank_pattern or {}).values()])


def _reasons(given: dict[str, Any], unknown: list[str]) -> Iterator[str]:
    merge = "merge it into its base with peft (merge_and_unload), and use the merged model"
    if given.get("peft_type") != "LORA":
        yield f"is an adapter of the kind {given.get('peft_type')}, not LoRA; {merge}"
    for name in (*OTHER_KINDS, *unknown):
        if given.get(name):
            yield f"{CONFIG} has {name}, which is not LoRA on linear layers alone; {merge}"
    if given.get("bias", "none") != "none":
        yield f"{CONFIG} has bias={given['bias']}: the base's biases were trained as well; {merge}"


def require(folder: Path, settings: Lora) -> None:
    """Raises TpawError where training with ``settings`` would not go on from the adapter in ``folder``."""
    config = read_config(folder)
    if (config.r, config.lora_alpha) != (settings.r, settings.alpha):
        raise TpawError(
            f"{folder}: its adapter has r={config.r} and alpha={config.lora_alpha:g}, not lora.r={settings.r} and "
            f"lora.alpha={settings.alpha:g}; set lora.r={config.r} lora.alpha={config.lora_alpha:g}"
        )


def active(model: PreTrainedModel) -> str | None:
    """The name of the adapter that ``model`` computes with."""
    return model.active_adapters()[0] if getattr(model, "peft_config", None) else None


def write(model: PreTrainedModel, folder: Path) -> None:
    """The active adapter, as PEFT, transformers and vllm read it; the same bytes for the same weights."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    name = active(model)
    assert name is not None
    weights = {PREFIX + key: value.float().cpu().contiguous() for key, value in sorted(_state(model, name).items())}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    peft_config: Any = model.peft_config
    config = {
        **peft_config[name].to_dict(),
        "base_model_name_or_path": None,
        "revision": None,
        "inference_mode": True,
    }
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    (folder / CONFIG).write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n")


def merge(model: PreTrainedModel) -> None:
    """Add the active adapter to its base, in float32, and leave a plain model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    model.float()
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            model.set_submodule(name, module.get_base_layer())
    model._hf_peft_config_loaded = False
    del model.peft_config


def _add(model: PreTrainedModel, config: LoraConfig, name: str) -> None:
    mode = model.training
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of a second adapter, and of targets that are refused below
        model.add_adapter(config, name)
    for parameter in model.parameters():  # it comes in the base's precision, too coarse for small updates
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    model.train(mode)  # a new adapter's dropout is on
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if hasattr(layer, "base_layer"):
            raise TpawError("lora.target_modules: names the embeddings or the output projection; leave them out")


def _state(model: PreTrainedModel, name: str) -> dict[str, torch.Tensor]:
    from peft import get_peft_model_state_dict

    found: dict[str, torch.Tensor] = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return found
