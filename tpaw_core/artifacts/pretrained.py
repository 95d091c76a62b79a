"""Models as others publish them, on the hub or in a folder: loaded, or refused before any weights are read.

Whatever transformers, torch or jinja2 raise on the way reaches the user as one message.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tpaw_core.errors import TpawError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
PICKLE = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")  # how classes with a language model's head end


def load_config(source: str | Path, revision: str | None = None) -> Any:
    """Raises TpawError for what is not a whole causal language model with weights that can be trained."""
    from transformers import AutoConfig

    _refuse_pickles(source)
    with _one_message(source):
        if (folder := adapter(source, revision)) is not None:
            raise TpawError(f"model {str(source)!r}: {_of_adapter(folder)}")
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
        if (reason := next(reasons(config), None)) is not None:
            raise TpawError(f"model {str(source)!r}: {reason}")
    if config.get_text_config() is not config:
        logger.info("model %r: using only its language model; image and audio parts are ignored", str(source))
    return config


SPREAD = "auto"  # a device: layer after layer on all accelerators of this machine


def roomy_device(source: str | Path, revision: str | None, dtype: str) -> str:
    """Where a whole model has room in ``dtype``: on one accelerator or, if that is too small, spread over all."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    size = load_empty(source, revision).num_parameters() * getattr(torch, dtype).itemsize
    return SPREAD if size > 0.8 * torch.cuda.mem_get_info()[1] and torch.cuda.device_count() > 1 else "cuda"


class Sharding(NamedTuple):
    """How a model's weights are divided among processes, by FSDP2."""

    ranks: int
    frozen: bool = True  # whether these weights are not trained
    bfloat16: bool = False  # layers compute in bfloat16 on weights that stay float32
    cpu_offload: bool = False


def load_empty(source: str | Path, revision: str | None = None) -> PreTrainedModel:
    """The model without memory for its weights. Raises as `load_config`."""
    import torch
    from transformers import AutoModelForCausalLM

    config = load_config(source, revision)
    with _one_message(source), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    return model


def need_divisible(model: PreTrainedModel, ranks: int, *, frozen: bool) -> None:
    """Raises TpawError where the model's weights cannot be divided, or not be trained so (``frozen``: they are not)."""
    remedy = "set sft.sharded=false and training.sharded=false, which give each process a whole copy"
    if not model.fsdp_plan:
        raise TpawError(f"{type(model).__name__} cannot be divided among processes by transformers; {remedy}")
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    # Shares of unequal size are padded, once for each use: the two copies of tied weights would grow apart.
    if embedding is head and len(embedding) % ranks and not frozen:
        raise TpawError(
            f"{type(model).__name__}: its embedding, which is also its output projection, has {len(embedding):,} rows, "
            f"and {ranks} processes cannot divide them equally; use another number of processes, or {remedy}"
        )


def need_accelerator() -> None:
    """Raises TpawError where weights have nothing to be moved away from."""
    import torch

    if not torch.cuda.is_available():
        raise TpawError("cpu_offload: there is no accelerator here, so all weights are in main memory; set it to false")


def load_model(
    source: str | Path, revision: str | None = None, *, dtype: str, device: str, sharding: Sharding | None = None
) -> PreTrainedModel:
    """The model in evaluation mode; with ``sharding``, this process's share. ``device`` may be SPREAD.

    Raises TpawError where it cannot be loaded, or not completely.
    """
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    divided: dict[str, Any] = {}
    if sharding is not None:
        need_divisible(load_empty(source, revision), sharding.ranks, frozen=sharding.frozen)
        if sharding.cpu_offload:
            need_accelerator()
        divided["distributed_config"] = DistributedConfig(
            fsdp_size=sharding.ranks, fsdp_mixed_precision=sharding.bfloat16, fsdp_cpu_offload=sharding.cpu_offload
        )
    elif device == SPREAD:
        divided["device_map"] = SPREAD
    load_config(source, revision)
    with _one_message(source):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            revision=revision,
            trust_remote_code=False,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below
            **divided,
        )
        model, report = loaded
        mismatched = [name for name, *_ in report["mismatched_keys"]]
        for what, names in (
            ("are not in its files", report["missing_keys"]),
            ("have a different shape in its files", mismatched),
        ):
            if names:
                raise TpawError(
                    f"model {str(source)!r}: {len(names)} of its weights {what} ({', '.join(sorted(names)[:3])}), and "
                    "would be initialised randomly. Either config.json is for a different model or a weights file is "
                    "missing; get the complete checkpoint"
                )
        if hasattr(model.config, "rescale_every"):  # RWKV would divide its weights in place whenever it is evaluated
            model.config.rescale_every = 0
        on_device: PreTrainedModel = model.eval() if divided else model.to(device).eval()
    return on_device


def load_tokenizer(source: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Raises TpawError where it cannot be loaded. Of several chat templates it keeps the one named default."""
    from transformers import AutoTokenizer

    with _one_message(source):
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    for name in ("is_local", "local_files_only"):  # how it was loaded would be saved with it, and change the digest
        tokenizer.init_kwargs.pop(name, None)
    templates = tokenizer.chat_template
    if isinstance(templates, dict) and "default" in templates:
        others = ", ".join(sorted(set(templates) - {"default"}))
        if others:
            logger.info("%s: using its chat template 'default' (others: %s)", source, others)
        tokenizer.chat_template = templates["default"]
    return tokenizer


def reasons(config: Any) -> Iterator[str]:
    """Why a model with this config cannot be fine-tuned as a causal language model."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    kind, classes = config.model_type, getattr(config, "architectures", None) or []
    if quantised := getattr(config, "quantization_config", None):
        method = (quantised if isinstance(quantised, dict) else vars(quantised)).get("quant_method", "unknown method")
        yield (
            f"is quantised ({getattr(method, 'value', method)}), but fine-tuning changes every weight; use the "
            "16- or 32-bit checkpoint that it was made from"
        )
    if getattr(config, "is_encoder_decoder", False):
        yield f"is an encoder-decoder ({kind}); use a causal language model, which continues its prompt"
    elif type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        text = " with a part for images or sound" if config.get_text_config() is not config else ""
        yield f"has type {kind}{text}, which is not a text-only causal language model; use a model that is"
    elif config.get_text_config() is not config and _class(config).config_class is type(config):
        yield f"has type {kind}, a language model that also takes images or audio; use a text-only model"
    elif classes and not any(name.endswith(CAUSAL) for name in classes):
        yield (
            f"was saved as {', '.join(classes)}, without the head of a language model (for example to embed or to "
            "classify texts); use a checkpoint that has one"
        )


def _class(config: Any) -> Any:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return found[0] if isinstance(found, (list, tuple)) else found


def adapter(source: str | Path, revision: str | None) -> Path | None:
    """The folder of its files, where ``source`` is an adapter; transformers would load its base in silence."""
    from transformers.utils import cached_file, find_adapter_config_file

    with _one_message(source):
        path = find_adapter_config_file(str(source), revision=revision)
        if path is None:
            return None
        if not Path(source).is_dir():  # on the hub: the weights come beside the config
            cached_file(str(source), "adapter_model.safetensors", revision=revision)
    return Path(path).parent


def snapshot(source: str, revision: str) -> str:
    """The folder in the hub's cache that holds this revision's files, weights included."""
    from huggingface_hub import snapshot_download

    with _one_message(source):
        return snapshot_download(source, revision=revision, allow_patterns=["*.json", "*.safetensors"])


def _of_adapter(folder: Path) -> str:
    """Why an adapter is refused where a whole model is asked for."""
    given = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return (
        f"is a PEFT adapter ({given.get('peft_type', 'of unknown type')}) of {given.get('base_model_name_or_path')!r}"
        ", not a whole model; set lora.r and lora.alpha to continue training it, or merge it into its base model "
        "with peft "
        "(AutoPeftModelForCausalLM.from_pretrained, merge_and_unload, save_pretrained), save the tokenizer in the same "
        "folder, and name that folder"
    )


def _refuse_pickles(source: str | Path) -> None:
    if Path(source).is_dir() and not list(Path(source).glob("*.safetensors")):
        for path in sorted(Path(source).iterdir()):
            if path.suffix in PICKLE:
                raise TpawError(f"{path}: is a pickle file, which can run code when loaded; use safetensors")


@contextmanager
def _one_message(source: str | Path) -> Iterator[None]:
    """Any error within, as one TpawError that says what to do."""
    try:
        yield
    except TpawError:
        raise
    except Exception as error:
        told = " ".join(str(error).split())[:300] or type(error).__name__
        raise TpawError(f"model {str(source)!r}: cannot be loaded. {_remedy(source, error)} ({told})") from error


def _remedy(source: str | Path, error: Exception) -> str:
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return "It does not fit into memory: use a smaller one, or free memory."
    if isinstance(error, ImportError):
        return "It needs a package that is not installed: install it, or use another model."
    if "trust_remote_code" in str(error):
        return "It needs custom code, which tpaw never runs: use a model type that transformers supports."
    if Path(source).is_dir():
        return (
            "The folder must hold config.json, safetensors and a tokenizer as save_pretrained of transformers writes "
            "them: check the file named here, or copy the folder again."
        )
    if os.environ.get("HF_HUB_OFFLINE"):
        return "HF_HUB_OFFLINE is set: unset it, or use a local folder."
    return "Use a folder that exists, or a hub id that this account may read (`hf auth login`)."
