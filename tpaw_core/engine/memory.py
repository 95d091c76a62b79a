"""Memory: what one process holds while it trains. Weights, gradients and optimiser state are counted; what comes and
goes is estimated, activations from the shape of a Llama-like model.

Knows configs and settings; must not know devices, stages or files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tpaw_core.config.optimisation import Optimisation

# Bytes per parameter that an optimiser keeps beside float32 weights and gradients.
STATES = {"adamw_torch_8bit": 2, "adamw": 8, "adam": 8, "rmsprop": 4, "adagrad": 4, "sgd": 0, "lion": 4, "adafactor": 1}
ALL_AT_ONCE = ("adamw_torch", "rmsprop", "adagrad")  # torch steps all weights together, with a copy of all of them


class Plan(NamedTuple):
    """Bytes of one process."""

    weights: int
    gradients: int
    states: int
    gathered: int  # of divided weights: two layers, and the embedding or output projection
    passing: int  # about: of activations and casts in a pass, or of copies in an optimiser's step, what is more

    @property
    def certain(self) -> int:
        return self.weights + self.gradients + self.states + self.gathered

    @property
    def total(self) -> int:
        return self.certain + self.passing


def plan(model: PreTrainedModel, adapter: int | None, settings: Optimisation, *, ranks: int, bf16: bool) -> Plan:
    """Of training all weights of ``model`` or, on top of them, an ``adapter`` of so many parameters.

    ``model`` may lie on the device meta. ``ranks``: that divide its weights, where ``settings`` ask for that.
    """
    whole = model.num_parameters()
    trained, frozen = (whole, 0) if adapter is None else (adapter, 2 * whole)
    state = next((size for known, size in STATES.items() if settings.optim.startswith(known)), 8)
    coarse, gathered = bf16 or adapter is not None, 0
    if settings.sharded:
        gathered = (2 if coarse else 4) * _gathered(model)
        frozen //= ranks
        if adapter is None:  # adapters are small, and every process has them whole
            trained //= ranks
    weights, gradients, states = frozen + 4 * trained, 4 * trained, state * trained
    if settings.cpu_offload:
        weights = gradients = states = 0
    plain = adapter is None and not settings.sharded
    casts = 2 * trained if bf16 and plain else 0  # autocast keeps them until the forward pass has ended
    step = 4 * trained if settings.optim in ALL_AT_ONCE and plain else 0
    activations = _activations(model, settings, 2 if coarse else 4)
    return Plan(weights, gradients, states, gathered, max(activations + casts, step))


def _gathered(model: PreTrainedModel) -> int:
    """Parameters of the vocabulary's matrix and of two layers."""
    config = model.config.get_text_config()
    vocabulary: int = model.get_output_embeddings().weight.numel()
    return vocabulary + 2 * max(0, model.num_parameters() - vocabulary) // max(1, config.num_hidden_layers)


def _activations(model: PreTrainedModel, settings: Optimisation, size: int) -> int:
    """Bytes that a pass of max_tokens tokens keeps for the backward pass."""
    config = model.config.get_text_config()
    width, inner = getattr(config, "hidden_size", 0), getattr(config, "intermediate_size", None)
    if not width or not isinstance(inner, int):
        return 0
    # Per token and layer: 4 x inner in the MLP, 10 x width in matrix products, and 4 x width in float32 between them.
    layer = size * (4 * inner + 10 * width) + 4 * 4 * width
    layers: int = config.num_hidden_layers
    return settings.max_tokens * (4 * width * layers + layer if settings.activation_checkpointing else layer * layers)
