"""Attention over packed batches: prompts look at themselves, a response at its prompt and at itself.

Keys and values of a prompt are computed once, however many responses it has, and no token looks at a stranger's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from tpaw_core.packing import Layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME, FLEX = "tpaw_packed", "tpaw_packed_flex"
T = TypeVar("T")


class _Place(torch.autograd.Function):
    """Rows of ``x`` to ``slots`` of a larger tensor, whose other rows hold anything finite and get no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(slots)
        source = slots.new_zeros(size).index_copy_(0, slots, torch.arange(len(slots), device=slots.device))
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (slots,) = ctx.saved_tensors
        return gradient.index_select(0, slots), None, None


class _Take(torch.autograd.Function):
    """Rows ``slots`` of ``x``, which are all different."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.size = len(x)
        return x.index_select(0, slots)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (slots,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.size, *gradient.shape[1:]).index_copy_(0, slots, gradient), None


class _Spread(torch.autograd.Function):
    """Each row of ``x`` to those that ``owner`` gives it; the sums of the way back are a small matrix product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, owner: Tensor) -> Tensor:
        ctx.save_for_backward(owner)
        ctx.size = len(x)
        return x.index_select(0, owner)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (owner,) = ctx.saved_tensors
        own = (torch.arange(ctx.size, device=owner.device)[:, None] == owner).to(gradient.dtype)
        return (own @ gradient.flatten(1)).view(ctx.size, *gradient.shape[1:]), None


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
    split = len(layout.prompt_slots)
    in_prompt, in_response = [], []
    options: Any = {"scale": scaling, "dropout_p": dropout}
    # A processor's attention is several times slower backwards in bf16, so there it is float32 whatever the rest is.
    with torch.autocast(query.device.type, enabled=False):
        for x in (query, key, value):
            x = (x if x.is_cuda else x.float())[0].transpose(0, 1)
            if (groups := query.shape[1] // x.shape[1]) > 1:
                x = x.repeat_interleave(groups, dim=1)
            in_prompt.append(_padded(x[:split], layout.prompt_slots, prompts, widest))
            in_response.append(_padded(x[split:], layout.response_slots, responses, longest))
        q, k, v = in_prompt
        heard = scaled_dot_product_attention(q, k, v, is_causal=True, **options)  # what pads heard is not taken
        parts = [_Take.apply(heard.transpose(1, 2).flatten(0, 1), layout.prompt_slots)]
        if longest:
            q, *own = in_response
            k, v = (torch.cat([_Spread.apply(p, layout.owner), o], 2) for p, o in zip((k, v), own, strict=True))
            mask = _once(_mask, layout).to(q.dtype)
            heard = scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)
            parts.append(_Take.apply(heard.transpose(1, 2).flatten(0, 1), layout.response_slots))
        return torch.cat(parts)[None].to(query.dtype), None


def attend_flex(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    layout: Layout,
    **_: Any,
) -> tuple[Tensor, None]:
    """The same by FlexAttention: nothing is padded, and blocks in which no token sees another are skipped."""
    flex = _compiled() if query.is_cuda else flex_attention
    query, key, value = (x.to(value.dtype) for x in (query, key, value))
    mask = _once(_block_mask, layout)
    heard = flex(query, key, value, block_mask=mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1])
    return heard.transpose(1, 2), None


def _mask(layout: Layout) -> Tensor:
    """[S, 1, R, P + R] 0 where a response may look, -inf elsewhere."""
    _, widest, _, longest = layout.shape
    columns = torch.arange(widest + longest, device=layout.owner.device)
    in_prompt = columns < layout.prompts[layout.owner][:, None, None]
    in_response = columns - widest <= columns[:longest, None]
    seen = torch.where(columns < widest, in_prompt, in_response)
    return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, -torch.inf)[:, None]


def _block_mask(layout: Layout) -> BlockMask:
    tree, branch = layout.tree, layout.branch

    def sees(_: Tensor, __: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (tree[q] == tree[k]) & ((branch[k] < 0) | (branch[q] == branch[k])) & (k <= q)

    make = _compiled_mask() if tree.is_cuda else create_block_mask
    return make(sees, None, None, len(tree), len(tree), device=tree.device)


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=True)


@cache
def _compiled_mask() -> Any:
    return torch.compile(create_block_mask, dynamic=True)


_latest: dict[Any, tuple[Layout, Any]] = {}


def _once(make: Callable[[Layout], T], layout: Layout) -> T:
    """All layers of one pass share what is made for its layout."""
    if make not in _latest or _latest[make][0] is not layout:
        _latest[make] = (layout, make(layout))
    made: T = _latest[make][1]
    return made


def _padded(x: Tensor, slots: Tensor, rows: int, width: int) -> Tensor:
    """[tokens, heads, head_dim] to [rows, heads, width, head_dim]; what no token fills is never looked at."""
    placed: Tensor = _Place.apply(x, slots, rows * width)
    return placed.view(rows, width, *x.shape[1:]).transpose(1, 2)


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


def ways(model: PreTrainedModel) -> list[str]:
    """The packed attentions to try on the model's device, the fastest first."""
    return [FLEX, NAME] if model.device.type == "cuda" else [NAME]


def why_not_packed(model: PreTrainedModel, longest: int) -> str | None:
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
        return "it caps attention's logits"
    return None
