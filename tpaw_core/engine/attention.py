"""Attention over packed batches: prompts look at themselves, a response at its prompt and at itself.

Keys and values of a prompt are computed once, however many responses it has, and no token sees those of another group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from tpaw_core.engine.packing import Layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel


NAME, FLEX = "tpaw_packed", "tpaw_packed_flex"


T = TypeVar("T")


class _Index(NamedTuple):
    """Which token lies where; empty slots repeat token 0 and are masked out."""

    prompt: Tensor  # [B * P] -> tokens
    response: Tensor  # [S * R] -> tokens
    context: Tensor  # [S * (P + R)] -> tokens: the prompt of each response, and itself
    slots: Tensor  # [response tokens] -> S * (P + R)
    own: Tensor  # [B, S] 1 where the prompt is the response's
    mask: Tensor  # [S, 1, R, P + R] 0 where a response may look, -inf elsewhere


class _Arrange(torch.autograd.Function):
    """Tokens [tokens, heads, head_dim] to prompts [B * P, ...] and to responses [S * R, ...] or their contexts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout, index: _Index, context: bool) -> tuple[Tensor, Tensor]:
        ctx.layout, ctx.index, ctx.context = layout, index, context
        return x.index_select(0, index.prompt), x.index_select(0, index.context if context else index.response)

    @staticmethod
    def backward(ctx: Any, to_prompt: Tensor, to_response: Tensor) -> tuple[Tensor | None, ...]:
        layout, index = ctx.layout, ctx.index
        split, shape = len(layout.prompt_slots), to_prompt.shape[1:]
        if ctx.context:  # a prompt's gradient is the sum over its responses: a small matrix product
            _, widest, responses, _ = layout.shape
            heard = to_response.reshape(responses, -1)[:, : widest * shape.numel()]
            to_prompt = (index.own.to(heard.dtype) @ heard).view_as(to_prompt).add_(to_prompt)
        gradient = to_prompt.new_empty(split + len(layout.response_slots), *shape)
        torch.index_select(to_prompt, 0, layout.prompt_slots, out=gradient[:split])
        slots = index.slots if ctx.context else layout.response_slots
        torch.index_select(to_response, 0, slots, out=gradient[split:])
        return gradient, None, None, None


class _Collect(torch.autograd.Function):
    """Prompts [B * P, ...] and responses [S * R, ...] back to tokens."""

    @staticmethod
    def forward(ctx: Any, prompt: Tensor, response: Tensor, layout: Layout) -> Tensor:
        ctx.layout, ctx.sizes = layout, (len(prompt), len(response))
        split = len(layout.prompt_slots)
        out = prompt.new_empty(split + len(layout.response_slots), *prompt.shape[1:])
        torch.index_select(prompt, 0, layout.prompt_slots, out=out[:split])
        torch.index_select(response, 0, layout.response_slots, out=out[split:])
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        layout, split = ctx.layout, len(ctx.layout.prompt_slots)
        slots, parts = (layout.prompt_slots, layout.response_slots), (gradient[:split], gradient[split:])
        placed = (
            own.new_zeros(size, *own.shape[1:]).index_copy_(0, slot, own)
            for size, slot, own in zip(ctx.sizes, slots, parts, strict=True)
        )
        return *placed, None


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    layout: Layout,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: [1, heads, tokens, head_dim] in, [1, tokens, heads, head_dim] out."""
    prompts, widest, responses, longest = layout.shape
    index = _once(_index, layout)
    at_prompt, at_response = [], []
    options: Any = {"scale": scaling, "dropout_p": dropout}
    # A processor's attention is several times slower backwards in bf16, so there it is float32 whatever the rest is.
    # Elsewhere the values decide: under autocast the rotation of queries and keys has left these in float32.
    dtype = value.dtype if value.is_cuda else torch.float32
    with torch.autocast(query.device.type, enabled=False):
        for x, context in ((query, False), (key, True), (value, True)):
            x = x.to(dtype)[0].transpose(0, 1)
            if (groups := query.shape[1] // x.shape[1]) > 1:
                x = x.repeat_interleave(groups, dim=1)
            prompt, response = _Arrange.apply(x, layout, index, context)
            at_prompt.append(prompt.view(prompts, widest, *x.shape[1:]).transpose(1, 2))
            at_response.append(response.view(responses, longest + context * widest, *x.shape[1:]).transpose(1, 2))
        q, k, v = at_prompt
        heard = [scaled_dot_product_attention(q, k, v, is_causal=True, **options)]  # the outputs of padding are dropped
        q, k, v = at_response
        heard.append(scaled_dot_product_attention(q, k, v, attn_mask=index.mask.to(q.dtype), **options))
        tokens = _Collect.apply(*(x.transpose(1, 2).flatten(0, 1) for x in heard), layout)
        return tokens[None].to(query.dtype), None


def attend_flex(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    layout: Layout,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """The same by FlexAttention: nothing is padded, and blocks in which no token sees another are skipped."""
    if dropout:  # FlexAttention has none
        return attend(module, query, key, value, attention_mask, scaling=scaling, layout=layout, dropout=dropout)
    flex = _compiled() if query.is_cuda else flex_attention
    query, key, value = (x.to(value.dtype) for x in (query, key, value))
    mask = _once(_block_mask, layout)
    heard = flex(query, key, value, block_mask=mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1])
    return heard.transpose(1, 2), None


def _index(layout: Layout) -> _Index:
    prompts, widest, responses, longest = layout.shape
    split, count = len(layout.prompt_slots), len(layout.response_slots)
    device = layout.prompt_of.device
    number = torch.arange(split + count, device=device)
    prompt = number.new_zeros(prompts * widest).index_copy_(0, layout.prompt_slots, number[:split])
    response = number.new_zeros(responses * longest).index_copy_(0, layout.response_slots, number[split:])
    context = torch.cat([prompt.view(prompts, widest)[layout.prompt_of], response.view(responses, longest)], 1)
    slots = layout.response_slots + (layout.response_slots // max(longest, 1) + 1) * widest
    own = (torch.arange(prompts, device=device)[:, None] == layout.prompt_of).float()
    columns = torch.arange(widest + longest, device=device)
    in_prompt = columns < layout.prompts[layout.prompt_of][:, None, None]
    in_response = columns - widest <= columns[:longest, None]
    seen = torch.where(columns < widest, in_prompt, in_response)
    mask = torch.zeros(seen.shape, device=device).masked_fill_(~seen, -torch.inf)[:, None]
    return _Index(prompt, response, context.flatten(), slots, own, mask)


def _block_mask(layout: Layout) -> BlockMask:
    prompt, response = layout.prompt_index, layout.response_index

    def sees(_: Tensor, __: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (prompt[q] == prompt[k]) & ((response[k] < 0) | (response[q] == response[k])) & (k <= q)

    make = _compiled_mask() if prompt.is_cuda else create_block_mask
    return make(sees, None, None, len(prompt), len(prompt), device=prompt.device)


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=True)


@cache
def _compiled_mask() -> Any:
    return torch.compile(create_block_mask, dynamic=True)


_latest: dict[Any, tuple[Tensor, Any]] = {}


def _once(make: Callable[[Layout], T], layout: Layout) -> T:
    """``make(layout)``, computed once for all layers of a pass; divided layers copy the tuple, but not its tensors."""
    if make not in _latest or _latest[make][0] is not layout.prompt_of:
        _latest[make] = (layout.prompt_of, make(layout))
    made: T = _latest[make][1]
    return made


AttentionInterface.register(NAME, attend)


AttentionInterface.register(FLEX, attend_flex)


@contextmanager
def packed(model: PreTrainedModel, name: str = NAME) -> Iterator[None]:
    """While this holds, ``model`` takes packed batches, and no others."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        _latest.clear()


def packed_attentions(model: PreTrainedModel) -> list[str]:
    """The packed attentions to try on the model's device, the fastest first."""
    return [FLEX, NAME] if model.device.type == "cuda" else [NAME]


def reason_not_packable(model: PreTrainedModel, longest: int) -> str | None:
    """Why this model cannot share prompts among responses of up to ``longest`` tokens; None where it can."""
    config = model.config.get_text_config()
    if not getattr(model, "_supports_attention_backend", False):
        return "its attention cannot be replaced"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    slides = kinds != {"full_attention"} or (getattr(config, "layer_types", None) is None and window is not None)
    if slides and (kinds - {"full_attention", "sliding_attention"} or window is None or window < longest):
        return f"its layers are {', '.join(sorted(kinds))} with a window of {window}"
    if getattr(config, "attn_logit_softcapping", None):
        return "it soft-caps attention logits"
    return None
