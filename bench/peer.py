"""TRL's DPOTrainer on the benchmark's rows: every triplet is a pair, and references are precomputed."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from bench.rows import Shape, groups


def pairs(shape: Shape, team: int) -> Dataset:
    """Pairs, with the columns that DPOTrainer makes from text."""
    return Dataset.from_list(
        [
            {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
            for prompt, (chosen, *responses) in groups(shape, team)
            for rejected in responses
        ]
    )


def trainer(model: Any, shape: Shape, state: str, *, bf16: bool, **options: Any) -> DPOTrainer:
    """A trainer created with one row; the benchmark's rows are added later, so that tokenising text is not measured."""
    words = Tokenizer(WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))
    return DPOTrainer(
        model,
        args=DPOConfig(
            state,
            per_device_train_batch_size=shape.peer_batch,
            bf16=bf16,
            use_cpu=True,
            gradient_checkpointing=False,
            precompute_ref_log_probs=True,
            max_length=None,
            logging_steps=1000,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=0,
            **options,
        ),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>"),
    )
