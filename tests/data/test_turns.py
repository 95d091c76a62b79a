"""What a chat template writes as the prompt and as the answer, and which rows it cannot show."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.templates import CHATML, NO_END, OPENED, THINKING, TOOLS, make, row
from tpaw_core.data import turns
from tpaw_core.data.rows import Row, Unusable

ASKED = {"role": "user", "content": "How many wheels have 3 carts?"}
# Mistral's: the system's text stands in the user's turn, as long as that is the last one.
MISTRAL = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set said = messages[0]['content'] %}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + (said + '\n\n' if loop.last and said is defined else '') + m['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
# DeepSeek's: opens the reasoning when it prompts, and leaves it out of every turn.
STRIPPING = OPENED.replace(
    "m['content']", "(m['content'].split('</think>')[-1] if m['role'] == 'assistant' else m['content'])"
)
# Qwen's: reasoning is left out of every turn but the last, and written anew there.
QWEN = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] != 'assistant' %}{{ m['content'] }}"
    "{% else %}{% set said = m['content'].split('</think>') %}{% if loop.last %}{{ '<think>\n' + "
    "(said[0].split('<think>')[-1] | trim if said | length > 1 else '') + '\n</think>\n\n' }}{% endif %}"
    "{{ said[-1] | trim }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PARTS = CHATML.replace(
    "m['content']", "(m['content'] | selectattr('type', 'eq', 'text') | map(attribute='text') | join)"
)


def written(template: str, made: Row, **options: Any) -> turns.Turn:
    tokenizer = make(template)
    tokenizer.bos_token = "<bos>"
    return turns.turn(tokenizer, made, options)


def refused(template: str, made: Row, **options: Any) -> str:
    with pytest.raises(Unusable) as caught:
        written(template, made, **options)
    return str(caught.value)


@pytest.mark.parametrize("answer", ["6", "3", "wheels"])
def test_a_prompt_that_an_answer_changes_stays_as_it_prompts(answer: str) -> None:
    """Also where the answer's text is in the question, or is the system's."""
    found = written(MISTRAL, row(answer, {"role": "system", "content": "3"}, ASKED))
    assert found.prompt == "<bos>[INST] 3\n\nHow many wheels have 3 carts?[/INST]"
    assert (found.preamble, found.answer, found.tail) == (" ", answer, "<eos>")


@pytest.mark.parametrize(
    "header", ["{{ messages | length }} messages\n", "{% if add_generation_prompt %}{{ bos_token }}{% endif %}"]
)
def test_what_a_prompt_begins_with_is_its_own(header: str) -> None:
    found = written(header + CHATML, row("6"))
    assert found.prompt.startswith(("1 messages\n<|im_start|>user", "<bos><|im_start|>user"))
    assert (found.preamble, found.answer, found.tail) == ("", "6", "<|im_end|>\n")


OBJECT = "c['function']['arguments']"


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize(
    ("template", "shown"),
    [
        (TOOLS, """count{"b": [1], "a": "it's"}"""),
        (TOOLS.replace(f"{OBJECT} | tojson", OBJECT), """count{"b": [1], "a": "it's"}"""),
        (TOOLS.replace(f"+ {OBJECT} | tojson", f"~ {OBJECT}"), """count{"b": [1], "a": "it's"}"""),
        (TOOLS.replace(OBJECT, f"{OBJECT}['b']"), "count[1]"),
    ],
    ids=["as an object", "as text", "printed", "one by one"],
)
def test_arguments_of_a_call_are_json_whatever_the_template_expects(template: str, shown: str, as_text: bool) -> None:
    arguments = {"b": [1], "a": "it's"}
    call = {"function": {"name": "count", "arguments": json.dumps(arguments) if as_text else arguments}}
    said = [ASKED, {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "6"}]
    assert shown in written(template, row("6", *said)).prompt


@pytest.mark.parametrize("text", ["2", "carts?", "assistant"])
def test_a_dropped_turn_is_seen_though_its_text_stands_elsewhere(text: str) -> None:
    without = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
    made = row("6", {"role": "system", "content": text}, ASKED, {"role": "user", "content": "2"})
    assert refused(without, made) == "the chat template leaves out this row's 'system' message"


def test_a_dropped_tool_is_seen_though_its_name_stands_elsewhere() -> None:
    tool = {"type": "function", "function": {"name": "carts"}}
    assert refused(CHATML, row("6", tools=[tool])) == "the chat template leaves out this row's tool 'carts'"
    call = {"function": {"name": "carts", "arguments": "{}"}}
    made = row("6", answer={"tool_calls": [call]})
    assert refused(CHATML, made) == "the chat template leaves out this row's tool call 'carts'"


def test_a_dropped_call_is_seen_though_its_tool_is_shown() -> None:
    """LFM2's template writes no calls, and gpt-oss's only the first."""
    tool, call = ({"type": "function", "function": {"name": "count", **more}} for more in ({}, {"arguments": "{}"}))
    silent = TOOLS.replace("{% for c in m['tool_calls'] or [] %}", "{% for c in [] %}")
    first = TOOLS.replace("m['tool_calls'] or []", "(m['tool_calls'] or [])[:1]")
    said = [ASKED, {"role": "assistant", "content": "", "tool_calls": [call, call]}, {"role": "tool", "content": "6"}]
    for template in (silent, first):
        for made in (row("6", *said, tools=[tool]), row("6", answer={"tool_calls": [call, call]}, tools=[tool])):
            assert refused(template, made).endswith("row's tool call 'count'")
            assert written(TOOLS, made)


@pytest.mark.parametrize("change", ["[:20]", " | lower", " | replace('many', '')"])
def test_a_text_that_is_cut_or_changed_is_refused(change: str) -> None:
    template = CHATML.replace("m['content']", f"(m['content']{change})")
    assert "row's 'user' message" in refused(template, row("6"))


@pytest.mark.parametrize("template", [STRIPPING, QWEN])
def test_reasoning_of_earlier_turns_may_go_but_not_what_they_say(template: str) -> None:
    said = {"role": "assistant", "content": "<think>\n3 x 2\n</think>\n\nIt is 6."}
    made = row("8", ASKED, said, {"role": "user", "content": "And 4?"})
    prompt = written(template, made).prompt
    assert "3 x 2" not in prompt
    assert "It is 6.<|im_end|>" in prompt
    silent = template.replace("[-1]", "[0]").replace("| trim }}", "| trim | replace('6', '') }}")
    assert "row's 'assistant' message" in refused(silent, made)


def test_reasoning_that_the_template_leaves_out_of_the_answer_is_named() -> None:
    made = row("<think>\n3 x 2\n</think>\n\n6")
    assert refused(STRIPPING, made).startswith(
        "the chat template drops the part of this row's answer before '</think>'"
    )


@pytest.mark.parametrize("answer", ["<think>\n3 x 2\n</think>\n\n6", "<think>3 x 2</think>6"])
def test_reasoning_in_an_answer_is_written_as_the_template_writes_it(answer: str) -> None:
    found = written(QWEN, row(answer))
    assert found.prompt.endswith("<|im_start|>assistant\n")
    assert found.preamble + found.answer == "<think>\n3 x 2\n</think>\n\n6"


def test_an_answer_that_begins_with_the_prompt_s_own_words_does_not_say_them_twice() -> None:
    found = written(OPENED, row("<think>\n3 x 2\n</think>\n\n6"))
    assert found.prompt.endswith("<|im_start|>assistant\n<think>\n")
    assert (found.preamble, found.answer) == ("", "3 x 2\n</think>\n\n6")


@pytest.mark.parametrize(
    ("template", "made", "opening"),
    [
        (CHATML, row("6"), ""),
        (THINKING, row("6"), "</think>"),
        (THINKING, row("6", answer={"reasoning_content": "3 x 2"}), "</think>"),
        (QWEN, row("<think>3 x 2</think>6"), "</think>"),
        (MISTRAL, row("6"), ""),
    ],
)
def test_where_the_answer_s_own_text_opens(template: str, made: Row, opening: str) -> None:
    assert written(template, made).opening == opening


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_under_any_name_is_shown_or_refused(key: str) -> None:
    made = row("6", answer={key: "two each"})
    assert refused(CHATML, made) == f"the chat template leaves out the {key} of this row's answer"
    assert "two each" in written(THINKING.replace("reasoning_content", key), made).preamble


@pytest.mark.parametrize("reasoning", ["two each", "think", "so </think"])
def test_the_row_s_reasoning_is_no_part_of_what_opens_answers(reasoning: str) -> None:
    """GLM and gpt-oss write no space behind it."""
    tight = THINKING.replace("\n</think>", "</think>")
    assert written(tight, row("6", answer={"reasoning_content": reasoning})).opening == "</think>"
    harmony = tight.replace("<think>", "<a>").replace("</think>", "<end><final>")
    if reasoning == "two each":
        assert written(harmony, row("6", answer={"reasoning_content": reasoning})).opening == "<end><final>"


def test_an_answer_with_reasoning_is_refused_where_the_prompt_ends_it() -> None:
    """Qwen3.5's template without thinking: two blocks of reasoning would stand before the answer."""
    ended = QWEN.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n\n</think>\n\n' }}{% endif %}")
    assert "row's answer contains reasoning" in refused(ended, row("<think>\n3 x 2\n</think>\n\n6"))
    assert written(ended, row("6")).answer == "6"


def test_a_template_that_reads_parts_gets_parts() -> None:
    made = row("6", {"role": "system", "content": "Be brief."}, ASKED)
    assert written(PARTS, made) == written(CHATML, made)
    indexing = CHATML.replace("m['content']", "m['content'][0]['text']")  # raises for plain content
    assert written(indexing, made) == written(CHATML, made)


def test_a_template_that_prints_a_list_as_it_is_gets_none() -> None:
    printing = CHATML.replace("m['content']", "(m['content'] | string if m['content'] is not string else '')")
    assert refused(printing, row("6")) == "the chat template leaves out this row's 'user' message"


def test_what_a_tool_says_may_be_written_as_json() -> None:
    """Llama 3.1's template does that."""
    template = CHATML.replace("m['content']", "(m['content'] | tojson if m['role'] == 'tool' else m['content'])")
    made = row("6", ASKED, {"role": "tool", "content": 'He said "6".\nÉté'})
    assert r"\"6\".\n" in written(template, made).prompt
    everything = CHATML.replace("m['content']", "(m['content'] | tojson if m['role'] == 'assistant' else m['content'])")
    assert refused(everything, row('It is "6".')) == "the chat template changes the text of this row's answer"


@pytest.mark.parametrize("completion", ["6", " 6", "6\n", "\n\n6 \n", "<|assistant|>\n6", "assistant\n6", "user\n\n6"])
@pytest.mark.parametrize("template", [CHATML, NO_END, OPENED, THINKING])
def test_prompt_and_target_are_what_the_conversation_is(completion: str, template: str) -> None:
    """Spaces around an answer, or the words around one in it, do not move its place."""
    found = written(template, row(completion))
    whole = turns.render(make(template), row(completion).conversation, {})
    if template != OPENED:
        assert found.prompt + found.preamble + found.answer + found.tail == whole
    assert found.answer.strip() == completion.strip()


@pytest.mark.parametrize("template", [CHATML, NO_END, MISTRAL, QWEN])
def test_spaces_that_a_template_takes_away_are_not_missed(template: str) -> None:
    trimming = template.replace("m['content'] ", "(m['content'] | trim) ")
    made = row(" 6 \n", {"role": "user", "content": "\n 3 carts? \n"})
    assert written(trimming, made).answer.strip() == "6"


def test_digits_that_look_like_the_marks_of_texts_are_only_digits() -> None:
    made = row("5318008", {"role": "user", "content": "5318008-0-5318008 and 5318009?"})
    found = written(CHATML, made)
    assert found.prompt == "<|im_start|>user\n5318008-0-5318008 and 5318009?<|im_end|>\n<|im_start|>assistant\n"
    assert found.answer == "5318008"


def test_a_template_whose_words_around_an_answer_hang_on_it_is_refused() -> None:
    template = CHATML.replace("'<|im_end|>\n'", "('<|im_end|>\n' if m['content'] | length < 9 else '<end_turn>\n')")
    assert refused(template, row("6", {"role": "user", "content": "3?"})).startswith(
        "the text that the chat template writes"
    )
