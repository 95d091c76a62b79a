"""Log-probabilities of response tokens without a tensor as wide as the vocabulary that outlives its chunk.

From hidden states and the output projection straight to one number per token; the backward pass computes each chunk's
logits again. Needs torch and a model; must not know teams, stages or services.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from tpaw_core.engine.packing import Pack

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, scale: float, cap: float | None
    ) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        hidden = hidden.to(dtype)
        logps = hidden.new_empty(len(hidden), dtype=torch.float32)
        with torch.autocast(device, enabled=False):
            cast = weight.to(dtype)
            for rows in _chunks(len(hidden), weight):
                logits = _logits(hidden[rows], cast, bias, scale, cap)
                logps[rows] = -cross_entropy(logits, target[rows], reduction="none")
        ctx.save_for_backward(hidden, weight, bias, target)
        ctx.scale, ctx.cap = scale, cap
        return logps

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target = ctx.saved_tensors
        cast = weight.to(hidden.dtype)
        to_hidden = torch.empty_like(hidden)
        # A frozen projection, as under LoRA, gets none: it would be as large as the embeddings.
        to_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        to_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        for rows in _chunks(len(hidden), weight):
            logits = _logits(hidden[rows], cast, bias, ctx.scale, ctx.cap)
            # d -log p(target) / d logits = p - [target]; the token's own gradient is folded into what is narrow.
            to_logits = logits.softmax(-1)
            to_logits.scatter_add_(-1, target[rows, None], to_logits.new_full((len(logits), 1), -1.0))
            if ctx.cap is not None:
                to_logits *= 1 - (logits / ctx.cap) ** 2
            own = -ctx.scale * gradient[rows, None]
            if to_bias is not None:
                to_bias += (own * to_logits).sum(0)
            narrow, own = to_logits.to(hidden.dtype), own.to(hidden.dtype)
            torch.mul(narrow @ cast, own, out=to_hidden[rows])
            if to_weight is not None:
                to_weight += narrow.T @ (hidden[rows] * own)
        return to_hidden, None if to_weight is None else to_weight.to(weight.dtype), to_bias, None, None, None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, cap: float | None) -> Tensor:
    logits = linear(hidden, weight, None if bias is None else bias.to(weight.dtype)).float()
    if scale != 1:
        logits *= scale
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _chunks(rows: int, weight: Tensor) -> list[slice]:
    """Slices of rows: on a processor few enough for its cache, of at most 32 MiB; on an accelerator of 512."""
    vocabulary = len(weight)
    cached = max(256, 2**18 // vocabulary)  # fewer than 256 would read the projection too often
    size = 2**27 // vocabulary if weight.is_cuda else min(cached, 2**23 // vocabulary)
    return [slice(start, start + max(16, size)) for start in range(0, rows, max(16, size))]


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    cap: float | None = None,
) -> Tensor:
    """log softmax(cap * tanh(scale * (hidden @ weight.T + bias) / cap))[target] in float32.

    Args:
        hidden: [N, H].  weight: [V, H].  bias: [V].  target: [N] token ids.
        scale: multiplies the logits (Cohere, Granite).  cap: soft-caps them (Gemma 2); None does not.
    """
    logps: Tensor = _TokenLogps.apply(hidden, weight, bias, target, scale, cap)
    return logps


def response_logps(model: PreTrainedModel, pack: Pack) -> Tensor:
    """log pi(response | prompt) [S] in float32, with gradient where the model's parameters have one."""
    tokens = _by_logits(model, pack) if pack.by_logits else _by_hidden(model, pack)
    return tokens.new_zeros(pack.responses).index_add(0, pack.sequence, tokens)


def _by_logits(model: PreTrainedModel, pack: Pack) -> Tensor:
    """For any model: each token's log-probability [N] from its own logits, all of which are in memory at once."""
    # While it is trained, `model.forward` is `response_logps`.
    logits = type(model).forward(model, **pack.inputs, use_cache=False).logits
    return -cross_entropy(logits.flatten(0, 1).index_select(0, pack.source).float(), pack.target, reduction="none")


def _by_hidden(model: PreTrainedModel, pack: Pack) -> Tensor:
    hidden = model.base_model(**pack.inputs, use_cache=False).last_hidden_state
    head, config = model.get_output_embeddings(), model.config.get_text_config()

    def project(hidden: Tensor) -> Tensor:
        return token_logps(
            hidden,
            head.weight,
            pack.target,
            bias=head.bias,
            scale=_scale(config),
            cap=getattr(config, "final_logit_softcapping", None),
        )

    # Its own call, not its weight alone: where weights are divided, that gathers them and adds up their gradients.
    head.forward = project
    try:
        tokens: Tensor = head(hidden.flatten(0, 1).index_select(0, pack.source))
    finally:
        del head.forward
    return tokens


def _scale(config: Any) -> float:
    scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None)
    return scale or 1 / (getattr(config, "logits_scaling", None) or 1)
