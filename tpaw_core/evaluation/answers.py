"""Our own tasks: how one is defined, how an answer is extracted from a text, and how the harness uses our decoding."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tpaw_core.artifacts.metrics import Sample
from tpaw_core.errors import TpawError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tpaw_core.config.params import Evaluation
    from tpaw_core.data.encoding import EncodedRows
    from tpaw_core.data.endings import Ending
    from tpaw_core.data.rows import Row
    from tpaw_core.data.tokens import Ids

HELDOUT, METRIC = "heldout", "exact_match"
OWN = (HELDOUT, "validation")  # each on the rows of data/<name>.jsonl
AS_GSM8K = {
    "ignore_case": True,
    "regexes_to_ignore": [",", r"\$", r"\.$"],
}  # "$1,000." is 1000, as in the harness's task


class Heldout(NamedTuple):
    """The rows of a task of our own, as texts and as token ids."""

    rows: list[Row]
    encoded: EncodedRows


def engine(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, Heldout],
    settings: Evaluation,
    *,
    max_length: int,
    ending: Ending,
    pad_id: int,
) -> Any:
    """The harness's model for tasks of our own: greedy answers by the generation that training uses."""
    from lm_eval.models.huggingface import HFLM

    from tpaw_core.config.params import Generation
    from tpaw_core.engine.generation import in_process

    greedy = Generation(temperature=0, max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size)
    # The room for the answer is not cut from the prompt, as far as the model's positions reach.
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or max_length
    room = max(max_length, min(longest, max_length + settings.max_new_tokens))

    class Engine(HFLM):
        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            docs = [request.doc for request in requests]
            prompts = [tasks[doc["task"]].encoded.prompts[doc["number"]] for doc in docs]
            answers = in_process.generate(model, prompts, greedy, max_length=room, ending=ending, pad_id=pad_id, seed=0)
            return judged([answer.ids for answer in answers], tokenizer, ending)

    return Engine(pretrained=model, tokenizer=tokenizer, batch_size=settings.batch_size, max_length=max_length)


def judged(ids: Iterable[Ids], tokenizer: PreTrainedTokenizerBase, ending: Ending) -> list[str]:
    """The texts in which an answer is looked for, of responses and of targets: without reasoning and special tokens."""
    shown = [list(own[:-1]) if len(own) and own[-1] in ending.stop_ids else list(own) for own in ids]
    if not ending.opening:
        return [text.strip() for text in tokenizer.batch_decode(shown, skip_special_tokens=True)]
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    special = re.compile("|".join(map(re.escape, {*added, *tokenizer.all_special_tokens})) or "(?!)")
    # The opening may hold special tokens itself, as <|channel|>final<|message|> does.
    return [special.sub("", ending.answer(text)).strip() for text in tokenizer.batch_decode(shown)]


def answer(text: str, pattern: str) -> str | None:
    """The answer that ``pattern`` finds in a text: of its groups, if it has any, the first that is not empty."""
    match = re.search(pattern, text)
    if match is None or (match.groups() and not any(match.groups())):  # the harness would find an empty answer
        return None
    return next((group for group in match.groups() if group), match.group()).strip()


def target_texts(held: Heldout, tokenizer: PreTrainedTokenizerBase, ending: Ending) -> list[str]:
    """Each encoded row's target as a response with its ids would be judged; the row's own text where it was cut."""
    whole = [ids[-1] == ending.end_id for ids in held.encoded.chosen]
    texts = judged(held.encoded.chosen, tokenizer, ending)
    kept = zip(whole, texts, held.encoded.places, strict=True)
    return [text if ended else ending.answer(held.rows[place].completion) for ended, text, place in kept]


def targets(name: str, texts: Sequence[str], places: Sequence[int], settings: Evaluation) -> list[str]:
    """The answer in each target. Raises TpawError for the first row, by its place in data/, whose target holds none."""
    found = []
    for text, place in zip(texts, places, strict=True):
        target = answer(text, settings.answer_pattern)
        if target is None:
            raise TpawError(
                f"data/{name}.jsonl: row {place + 1}: evaluation.answer_pattern {settings.answer_pattern!r} "
                "finds no answer in its target; fix the pattern or the row"
            )
        found.append(target)
    return found


def write_task(
    folder: Path, name: str, held: Heldout, tokenizer: PreTrainedTokenizerBase, settings: Evaluation, ending: Ending
) -> None:
    """A task of our own. Its documents are Parquet: a JSON reader would turn a target like 2024-05-05 into a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [held.rows[place] for place in held.encoded.places]
    found = targets(name, target_texts(held, tokenizer, ending), held.encoded.places, settings)
    documents = {
        "task": pa.array([name] * len(rows), pa.string()),
        "number": pa.array(range(len(rows)), pa.int64()),
        "text": pa.array([tokenizer.decode(list(ids)) for ids in held.encoded.prompts], pa.string()),
        "question": pa.array(["\n".join(m["content"] for m in row.prompt) for row in rows], pa.string()),
        "answer": pa.array(found, pa.string()),
        "target": pa.array([row.completion for row in rows], pa.string()),
    }
    pq.write_table(pa.table(documents), folder / f"{name}.parquet")
    task = {
        "task": name,
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.parquet")}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "text",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "num_fewshot": 0,
        "generation_kwargs": {"until": [], "max_gen_toks": settings.max_new_tokens, "do_sample": False},
        "filter_list": [
            {
                "name": "answer",
                "filter": [
                    {"function": "regex", "regex_pattern": settings.answer_pattern},
                    {"function": "take_first"},
                ],
            }
        ],
        "metric_list": [{"metric": METRIC, "aggregation": "mean", "higher_is_better": True, **AS_GSM8K}],
        "metadata": {"version": 1},
    }
    (folder / f"{name}.yaml").write_text(json.dumps(task))


def sample_of(sample: Any) -> Sample:
    """From the harness's record of one document."""
    doc = sample["doc"]
    return Sample(
        prompt=doc["question"].strip(),
        target=doc["target"],
        completion=sample["resps"][0][0],
        correct=float(sample[METRIC]),
    )
