"""An error says what helps; each advice that is given was tried, and helps."""

import json
import re
from typing import Any

import pytest
from tests.data.templates import GENERATION, chatml, with_habit
from tests.data.test_chat_template import with_template
from tests.data.test_templates import row_of
from transformers import PreTrainedTokenizerBase

from adpa.data.chat_template import ChatTemplate
from adpa.data.encoding import EncodedPair, Encoder
from adpa.errors import RowError

START = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
REASONING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{{ '<think>\n' + (m.F or '') + '\n</think>\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}" + GENERATION.replace("assistant\n", "assistant\n<think>\n")
)
# The switches under which a prompt does not open thinking, or does not close it.
SWITCHES: dict[str, tuple[str, dict[str, Any]]] = {
    "enable_thinking off": ("{% if enable_thinking | default(true) %}<think>{% endif %}", {"enable_thinking": False}),
    "thinking off": ("{% if thinking is not defined or thinking %}<think>{% endif %}", {"thinking": False}),
    "thinking on": ("{% if not thinking %}{{ '<think></think>' }}{% endif %}", {"thinking": True}),
    "an effort": ("{% if reasoning_effort != 'none' %}<think>{% endif %}", {"reasoning_effort": "none"}),
    "a budget": (
        "{% if thinking_budget is not defined or thinking_budget != 0 %}<think>{% endif %}",
        {"thinking_budget": False},
    ),
    "a word of its own": ("{% if not no_thoughts %}<think>{% endif %}", {"no_thoughts": True}),
}


def encode(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], **arguments: Any) -> EncodedPair | RowError:
    try:
        (pair,) = Encoder(ChatTemplate(tokenizer, arguments), 512, 1024).encode([("row 1", row)])
    except RowError as error:
        return error
    return pair


@pytest.mark.parametrize("case", SWITCHES)
def test_the_argument_that_helps_is_named_and_helps(case: str, small_tokenizer: PreTrainedTokenizerBase) -> None:
    opening, arguments = SWITCHES[case]
    tokenizer = with_template(small_tokenizer, chatml(generation=f"{START}{opening}{{% endif %}}"))
    error = encode(tokenizer, row_of("strings"))
    assert isinstance(error, RowError)
    named = re.search(r"pass --chat-template-kwargs '(.*?)'", str(error))
    assert named is not None
    assert json.loads(named[1]) == arguments
    assert isinstance(encode(tokenizer, row_of("strings"), **arguments), EncodedPair)


@pytest.mark.parametrize("field", ["reasoning_content", "thinking", "reasoning"])
def test_the_field_that_the_template_writes_is_named(field: str, small_tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer = with_template(small_tokenizer, REASONING.replace("m.F", f"m.{field}"))
    others = [name for name in ("reasoning_content", "thinking", "reasoning") if name != field]
    for other in others:
        row = row_of("strings") | {
            "chosen": [{"role": "assistant", "content": "In Paris.", other: "France?"}],
            "rejected": [{"role": "assistant", "content": "In Lyon.", field: "Italy?"}],
        }
        error = encode(tokenizer, row)
        assert isinstance(error, RowError)
        assert f"the template reads `{field}`: rename it" in str(error) or f"thinking (`{field}`)" in str(error)


def test_a_prompt_that_opens_thinking_takes_thinking_in_the_content(small_tokenizer: PreTrainedTokenizerBase) -> None:
    error = encode(with_habit(small_tokenizer, "opens thinking"), row_of("strings"))
    assert isinstance(error, RowError)
    assert "the prompt ends with <think>, where the model begins to think" in str(error)
    assert "give responses with their thinking (<think>…</think> in the content)" in str(error)


def test_advice_that_would_not_help_is_not_given(small_tokenizer: PreTrainedTokenizerBase) -> None:
    for kind in ("strings", "thinking"):
        error = encode(with_habit(small_tokenizer, "opens thinking and cuts it"), row_of(kind))
        assert isinstance(error, RowError)
        assert str(error).endswith("; edit the template, or pass --rendered with prompts that are rendered already")
    error = encode(with_habit(small_tokenizer, "plain"), row_of("reasoning content"))
    assert str(error).endswith(
        "`reasoning_content`, 'France?'; put the thinking into the content, or use another template"
    )


def test_arguments_of_a_row_count(small_tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer = with_habit(small_tokenizer, "opens thinking unless told")
    error = encode(tokenizer, row_of("strings") | {"chat_template_kwargs": {"enable_thinking": True}})
    assert isinstance(error, RowError)
    assert "--chat-template-kwargs" not in str(error)  # the row's value would go first


def test_white_space_that_the_tokenizer_merges_is_named(tokenizer: PreTrainedTokenizerBase) -> None:
    merging = with_template(
        tokenizer, chatml(generation=GENERATION.replace("\n", "\n\n")).replace("+ '\n' +", "+ '\n\n' +")
    )
    error = encode(merging, row_of("strings"))
    assert isinstance(error, RowError)
    assert str(error).endswith("; edit the white space around the end of the prompt in the template")
    error = encode(tokenizer, row_of("strings") | {"chosen": "\n\nIn Paris."})
    assert isinstance(error, RowError)
    assert str(error).endswith("; use a template that only appends, strip the response, or pass --drop-invalid")


def test_a_rendered_prompt_has_no_template_to_edit(tokenizer: PreTrainedTokenizerBase) -> None:
    row = {"prompt": "<|im_start|>assistant\n\n", "chosen": "In Paris.", "rejected": "No."}
    with pytest.raises(RowError) as caught:
        list(Encoder(ChatTemplate(tokenizer), 512, 1024, rendered=True).encode([("row 1", row)]))
    assert str(caught.value).endswith(
        "strip the end of the prompt or the beginning of the response, or pass --drop-invalid"
    )
