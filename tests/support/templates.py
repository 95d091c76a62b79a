"""Chat templates as model families have them, a tokenizer for each, and rows."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tpaw_core.data.rows import Row

TEXTS = ["How many wheels have 3 carts? 3 times 2 is 6. system user assistant tool think count(a)"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ALTERNATING = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "{% for m in messages %}{{ '<turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{{ m['content'] | trim }}{{ '<end_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)
# Writes a block of reasoning before every answer, and with enable_thinking=false already when it prompts.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{{ '<think>\n' + (m['reasoning_content'] or '') + '\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
# Prompts with an opened block of reasoning that a conversation does not have.
OPENED = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'")
NO_END = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TOOLS = (
    "{% if tools %}{{ 'tools: ' }}{% for t in tools %}{{ t['function']['name'] + ' ' }}{% endfor %}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}{{ c['function']['name'] + c['function']['arguments'] | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKS = ("<|im_start|>", "<|im_end|>", "<turn>", "<end_turn>")


def make(template: str, *, eos: str | None = "<eos>", meta: bool = False) -> Any:
    """A tokenizer; ``meta``: one that writes a symbol before the first word of every text, as SentencePiece does."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True) if meta else models.BPE())
    if meta:
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    else:
        bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = []
    special = ["<unk>", "<pad>", *([eos] if eos else []), *MARKS, *alphabet]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator(TEXTS, trainer)
    made = json.loads(bpe.to_str())  # bytes are ordinary tokens, as in models' own tokenizers
    made["added_tokens"] = [token for token in made["added_tokens"] if token["content"] not in alphabet]
    bpe = Tokenizer.from_str(json.dumps(made))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=eos, pad_token="<pad>", chat_template=template)


def row(completion: str = "3 times 2 is 6.", *messages: dict[str, Any], **more: Any) -> Row:
    prompt = list(messages) or [{"role": "user", "content": "How many wheels have 3 carts?"}]
    return Row("0" * 16, prompt, completion, **more)
