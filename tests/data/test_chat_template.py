from copy import deepcopy
from typing import Any

import pytest
from tests.data.templates import STYLES, chatml, with_habit
from transformers import PreTrainedTokenizerBase

from adpa.data.chat_template import ChatTemplate
from adpa.data.template_trials import TemplateRefusalError
from adpa.errors import ModelError

CONVERSATION = [{"role": "user", "content": "Where is the Louvre?"}, {"role": "assistant", "content": "In Paris."}]
TOOL = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}}}
USER = CONVERSATION[0]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Lyon"}}}


def with_template(tokenizer: PreTrainedTokenizerBase, template: Any) -> PreTrainedTokenizerBase:
    changed = deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def test_smollm2_ends_a_turn_with_im_end_and_a_newline_after_it(small_tokenizer: PreTrainedTokenizerBase) -> None:
    end = ChatTemplate(small_tokenizer).turn_end
    assert (end.token_id, end.trailing, end.text) == (small_tokenizer.get_vocab()["<|im_end|>"], 1, "<|im_end|>")


@pytest.mark.parametrize("style", STYLES)
def test_the_end_of_a_turn_is_found_in_the_template(style: str, small_tokenizer: PreTrainedTokenizerBase) -> None:
    styled = STYLES[style](small_tokenizer)
    template = ChatTemplate(styled)
    end = template.turn_end
    expected = (styled.get_vocab()[STYLES[style].end], STYLES[style].trailing, STYLES[style].end)
    assert (end.token_id, end.trailing, end.text) == expected
    ids = styled(template.render(CONVERSATION), add_special_tokens=False)["input_ids"]
    assert ids[-1 - end.trailing] == end.token_id


@pytest.mark.parametrize(
    ("suffix", "stops", "end"),
    [
        ("<a><b>", (), "<a>"),  # no token is known to end generation: the first
        ("<a><|im_end|>", (), "<a><|im_end|>"),  # the tokenizer's end of sequence
        ("<a><b>", ("<b>",), "<a><b>"),
        ("<a><b>", ("<a>", "<b>"), "<a>"),
        ("<a>\n<b>\n", ("<b>",), "<a>\n<b>"),  # generation goes on after the first
        ("<a>\n<|im_end|>\n", (), "<a>"),
        ("\n<a><b>", ("<b>",), "\n<a><b>"),
    ],
)
def test_a_response_runs_to_the_token_that_ends_generation(
    suffix: str, stops: tuple[str, ...], end: str, small_tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer = with_template(small_tokenizer, chatml().replace("<|im_end|>\n", suffix.replace("\n", "\\n")))
    tokenizer.add_tokens(["<a>", "<b>"], special_tokens=True)
    ids = tuple(tokenizer.get_vocab()[stop] for stop in stops)
    assert ChatTemplate(tokenizer, eos_token_ids=ids).turn_end.text == end


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (None, "the tokenizer has no chat template"),
        (
            "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}",
            "the chat template ends the assistant's turn with no special token",
        ),
        ("{{ raise_exception('No Latin') }}", "the chat template refuses a question and its answer: No Latin"),
        ("{{ messages[0]['content'] + eos_token }}", "the chat template changes the assistant's text"),
        (
            "{{ nothing.more }}",
            "the chat template refuses a question and its answer: UndefinedError: 'nothing' is undefined",
        ),
        ("{{ tools | length }}", "the chat template refuses a question and its answer: TypeError: object of type"),
        ({"tool_use": "{{ messages }}"}, "the chat template refuses a question and its answer: ValueError: "),
        ("{% for m in messages %}", "the chat template refuses a question and its answer: TemplateSyntaxError: "),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_with_the_checkpoints_name(
    template: Any, problem: str, small_tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(ModelError) as caught:
        _ = ChatTemplate(with_template(small_tokenizer, template)).turn_end
    assert str(caught.value).startswith(f"{small_tokenizer.name_or_path}: {problem}")
    assert "\n" not in str(caught.value)


def test_arguments_reach_the_template_and_those_of_a_call_go_first(small_tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer = with_template(small_tokenizer, chatml(before="{{ style | default('none') }}"))
    assert ChatTemplate(tokenizer).render(CONVERSATION).startswith("none<")
    template = ChatTemplate(tokenizer, {"style": "terse"})
    assert template.render(CONVERSATION).startswith("terse<")
    assert template.render(CONVERSATION, arguments={"style": "long"}).startswith("long<")


def test_thinking_is_switched_off_by_an_argument(small_tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer = with_habit(small_tokenizer, "cuts thinking of earlier turns")
    prompt = ChatTemplate(tokenizer, {"enable_thinking": False}).render(CONVERSATION[:1], add_generation_prompt=True)
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n")


@pytest.mark.parametrize(
    ("source", "takes"),
    [
        ("{% if thinking %}{% endif %}", True),
        ("{% if thinking is defined and not thinking %}{% endif %}", True),
        ("{{ message.thinking }}", False),
        ("{{ message['thinking'] }}", False),
        ("{{ rethinking }}", False),
    ],
)
def test_an_argument_is_a_variable_of_the_template(
    source: str, takes: bool, small_tokenizer: PreTrainedTokenizerBase
) -> None:
    assert ChatTemplate(with_template(small_tokenizer, source)).takes_argument("thinking") is takes


@pytest.mark.parametrize(
    ("habit", "roles"),
    [
        ("plain", {"system", "developer", "user", "assistant", "tool"}),
        ("skips system messages", {"developer", "user", "assistant", "tool"}),
        ("knows user and assistant", {"user", "assistant"}),
        ("raises", {"system", "developer", "user", "assistant", "tool"}),  # it refuses, and says why
    ],
)
def test_a_role_that_a_template_leaves_out_is_known(
    habit: str, roles: set[str], small_tokenizer: PreTrainedTokenizerBase
) -> None:
    template = ChatTemplate(with_habit(small_tokenizer, habit))
    conversations: dict[str, list[dict[str, Any]]] = {
        "system": [{"role": "system", "content": "a"}, USER],
        "developer": [{"role": "developer", "content": "a"}, USER],
        "user": [USER],
        "assistant": [*CONVERSATION, USER],
        "tool": [USER, {"role": "tool", "content": "a"}],
    }
    assert {role for role, messages in conversations.items() if template.left_out(messages) is None} == roles


CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
LEFT_OUT: list[tuple[str, list[dict[str, Any]], str | None]] = [
    ("plain", [USER, CALLING], "tool calls"),
    ("plain", [USER, CALLING, {"role": "tool", "content": "a"}], "tool calls"),
    ("tools", [USER, CALLING, {"role": "tool", "content": "a"}], None),
    ("plain", [*CONVERSATION, *CONVERSATION, USER], None),
    ("keeps the last question", [*CONVERSATION, USER], "messages with the role 'user'"),
    ("keeps the last question", [USER], None),
]


@pytest.mark.parametrize(("habit", "messages", "left_out"), LEFT_OUT)
def test_each_sequence_of_roles_is_tried(
    habit: str, messages: list[dict[str, Any]], left_out: str | None, small_tokenizer: PreTrainedTokenizerBase
) -> None:
    template = ChatTemplate(with_habit(small_tokenizer, habit))
    assert template.left_out(messages) == left_out
    template.tokenizer.chat_template = None  # it is tried once
    assert template.left_out(messages) == left_out


SKIPS = "m['role'] == 'system' and (tools or drop_system)"
FIRST_CALL = (
    "{% for m in messages %}{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0] | tojson }}{% endif %}{% endfor %}"
)


def test_tools_arguments_and_the_number_of_calls_make_another_trial(small_tokenizer: PreTrainedTokenizerBase) -> None:
    template = ChatTemplate(with_template(small_tokenizer, chatml(skip=SKIPS)))
    messages = [{"role": "system", "content": "hi"}, {"role": "user", "content": "hi there"}]
    system = "messages with the role 'system'"
    assert template.left_out(messages) is None
    assert template.left_out(messages, tools=[TOOL]) == system
    assert template.left_out(messages, arguments={"drop_system": True}) == system
    assert template.left_out(messages, arguments={"drop_system": False}) is None
    first = ChatTemplate(with_template(small_tokenizer, FIRST_CALL))
    assert first.left_out([USER, CALLING]) is None
    assert first.left_out([USER, CALLING | {"tool_calls": [CALL, CALL]}]) == "tool calls"


ARGUMENTS = {
    "as an object": ("c.function.arguments | tojson", '{"city": "Lyon"}'),
    "as text": ("'' + c.function.arguments", '{"city": "Lyon"}'),
    "as text that would be Python": ("c.function.arguments", '{"city": "Lyon"}'),
    "name by name": ("c.function.arguments.city", "Lyon"),
}


@pytest.mark.parametrize("way", ARGUMENTS)
def test_a_tool_calls_arguments_come_in_the_form_that_the_template_reads(
    way: str, small_tokenizer: PreTrainedTokenizerBase
) -> None:
    expression, written = ARGUMENTS[way]
    source = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ X }}{% endfor %}{% endfor %}"
    template = ChatTemplate(with_template(small_tokenizer, source.replace("X", expression)))
    assert template.render([{"role": "assistant", "content": "", "tool_calls": [CALL]}], [TOOL]) == written


def test_a_refusal_is_one_line(small_tokenizer: PreTrainedTokenizerBase) -> None:
    template = ChatTemplate(with_template(small_tokenizer, "{{ raise_exception('No.\n  Never.') }}"))
    with pytest.raises(TemplateRefusalError, match=r"^No\. Never\.$"):
        template.render(CONVERSATION)
