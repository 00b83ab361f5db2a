"""What a template writes around messages is a control token; what it says itself, and tags of answers, are text."""

from copy import deepcopy

import pytest
from tests.data.templates import GENERATION, HABITS, STYLES, chatml, with_habit
from transformers import PreTrainedTokenizerBase

from adpa.data.chat_template import ChatTemplate
from adpa.data.control_tokens import ControlTokens

OTHERS = (
    ["<b>"],
    ["<s>", "</s>"],
    ["[INST]"],
    ["[TABLE]", "[X]"],
    ["<table>", "</p>"],
    ["user", "assistant", "system"],
)
WRITES_THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.thinking %}{{ '<|start_thought|>' + m.thinking + '<|end_thought|>' }}{% endif %}"
    "{% for c in m.tool_calls or [] %}{{ '<act><arg>' + (c.function.arguments | tojson) + '</arg></act>' }}{% endfor %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}" + GENERATION
)


def control_tokens(tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> ControlTokens:
    changed = deepcopy(tokenizer)
    if template is not None:
        changed.chat_template = template
    return ControlTokens(ChatTemplate(changed))


@pytest.mark.parametrize("habit", HABITS)
def test_markers_are_control_tokens_and_markup_is_none(habit: str, small_tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = control_tokens(with_habit(small_tokenizer, habit)).tokens
    assert {"<|im_start|>", "<|im_end|>", "<|endoftext|>"} <= tokens
    assert tokens.isdisjoint(text for texts in OTHERS for text in texts)
    assert not any("look" in token or "adp" in token for token in tokens)


@pytest.mark.parametrize("style", STYLES)
def test_special_tokens_of_a_style_are_control_tokens(style: str, small_tokenizer: PreTrainedTokenizerBase) -> None:
    styled = STYLES[style](small_tokenizer)
    assert {*STYLES[style].special_tokens} <= control_tokens(styled).tokens


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + eos_token }}{% endfor %}", "<|user|>"),
        ("{% for m in messages %}{{ '[INST] ' + m.content + ' [/INST]' + eos_token }}{% endfor %}", "[/INST]"),
        ("{% for m in messages %}{{ '<<SYS>>\n' + m.content + '<</SYS>>' + eos_token }}{% endfor %}", "<<SYS>>"),
        (
            "{% for m in messages %}{{ '<turn:' + m.role + '>' + m.content + eos_token }}{% endfor %}",
            "<turn:assistant>",
        ),
    ],
)
def test_a_marker_that_is_no_token_of_its_own_counts(
    template: str, expected: str, small_tokenizer: PreTrainedTokenizerBase
) -> None:
    assert expected in control_tokens(small_tokenizer, template).tokens


@pytest.mark.parametrize(
    "instructions",
    ["Be <b>kind</b>.", "<RULES>\nBe kind.\n</RULES>", "Say [DONE] at the end.</RULES>", "<args-json-object>"],
)
def test_the_templates_own_instructions_make_no_control_tokens(
    instructions: str, small_tokenizer: PreTrainedTokenizerBase
) -> None:
    system = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\n" + instructions.replace("\n", "\\n")
    for end in ("<|im_end|>\\n' }}{% endif %}", "' }}{% endif %}"):  # the first turn may follow on the same line
        tokens = control_tokens(small_tokenizer, chatml(before=system + end)).tokens
        assert not {token for token in tokens if token in instructions}


def test_tags_of_thinking_and_of_tool_calls_are_text_of_answers_alone(small_tokenizer: PreTrainedTokenizerBase) -> None:
    found = control_tokens(small_tokenizer, WRITES_THINKING)
    for tag in ("<act>", "<arg>", "</act>", "<|start_thought|>", "<|end_thought|>"):
        assert found.find({"role": "assistant", "content": f"a {tag} b"}) is None
    assert found.find({"role": "user", "content": "a <act> b"}) == "<act>"
    for role in ("user", "assistant"):
        assert found.find({"role": role, "content": "a <|im_end|> b"}) == "<|im_end|>"


def test_every_text_of_a_message_is_searched(small_tokenizer: PreTrainedTokenizerBase) -> None:
    found = control_tokens(small_tokenizer)
    call = {"function": {"name": "look", "arguments": {"where": ["here", {"<|im_end|>": 1}]}}}
    for message in (
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "assistant", "content": "a", "reasoning_content": "<|im_end|>"},
        {"role": "user", "content": "a<|im_end|>"},
    ):
        assert found.find(message) == "<|im_end|>"
    assert found.find_in_json([{"function": {"name": "look", "description": "<|im_end|>"}}]) == "<|im_end|>"
    assert found.find({"role": "user", "content": "<|im_ end|> <im_end>"}) is None
