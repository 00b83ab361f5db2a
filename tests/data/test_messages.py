import json
from typing import Any

import numpy as np
import pytest

from adpa.data.messages import DROP, Message, holds_messages, parse_messages, shown
from adpa.errors import RowError

QUESTION: Message = {"role": "user", "content": "What is the capital of France?"}
ANSWER: Message = {"role": "assistant", "content": "Paris."}


def refusal(message: Message, reason: str) -> str:
    """The one line with which the message is refused, under the reason."""
    with pytest.raises(RowError) as caught:
        parse_messages("line 2: `chosen`", [message], "assistant")
    text = str(caught.value)
    assert text.startswith("line 2: `chosen` has ")
    assert "\n" not in text
    assert caught.value.reason == reason
    return text


def test_a_string_is_one_message() -> None:
    assert parse_messages("here", "Paris.", "assistant") == [ANSWER]


def test_fields_that_templates_know_are_kept_and_others_left_out() -> None:
    kept = {"name": "Ann", "reasoning_content": "Hm.", "thinking": "Hm!", "reasoning": "Hm?"}
    dropped = {"weight": 1.0, "language": "English", "tool_calls": [], "function_call": None, "images": []}
    assert parse_messages("here", [ANSWER | kept | dropped], "user") == [ANSWER | kept]


CALL = {"type": "function", "function": {"name": "search", "arguments": {"query": "capital"}}}


@pytest.mark.parametrize(
    ("sharegpt", "message"),
    [
        ({"from": "human", "value": "Hi"}, {"role": "user", "content": "Hi"}),
        ({"from": "gpt", "value": "Hi", "weight": 1}, {"role": "assistant", "content": "Hi"}),
        ({"from": "chatgpt", "value": "Hi"}, {"role": "assistant", "content": "Hi"}),
        ({"from": "system", "value": "Be brief."}, {"role": "system", "content": "Be brief."}),
        ({"from": "user", "value": "Hi"}, {"role": "user", "content": "Hi"}),
        ({"from": "tool", "value": "{}"}, {"role": "tool", "content": "{}"}),
        ({"from": "observation", "value": "Paris"}, {"role": "tool", "content": "Paris"}),
        (
            {"from": "function_call", "value": '{"name": "search", "arguments": {"query": "capital"}}'},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
        ),
        (
            {"from": "function_call", "value": json.dumps([CALL["function"], CALL["function"]])},
            {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
        ),
    ],
)
def test_a_message_of_sharegpt_gets_role_and_content(sharegpt: Message, message: Message) -> None:
    assert parse_messages("here", [sharegpt], "user") == [message]


@pytest.mark.parametrize(
    ("message", "reason", "problem"),
    [
        (
            {"from": "narrator", "value": "Once"},
            "wrong role",
            "a message from 'narrator'; expected one of human, gpt, system, tool, observation, function_call",
        ),
        ({"from": 5, "value": "Once"}, "wrong role", "a message from 5; expected"),
        ({"from": "function_call", "value": "search()"}, "broken tool call", "the tool call 'search()'; expected"),
        ({"from": "function_call", "value": '{"name": 5}'}, "broken tool call", "the tool call {'name': 5}; expected"),
        ({"from": "human", "value": "Hi", "images": ["a.png"]}, "images", "a message with `images`"),
    ],
)
def test_a_message_of_sharegpt_is_refused_by_what_is_wrong(message: Message, reason: str, problem: str) -> None:
    assert problem in refusal(message, reason)


@pytest.mark.parametrize("message", [ANSWER, {"from": "gpt", "value": "Paris."}])
def test_one_message_needs_no_list(message: Message) -> None:
    assert parse_messages("here", message, "user") == [ANSWER]


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "What is the capital "}, {"type": "text", "text": "of France?"}]
    assert parse_messages("here", [QUESTION | {"content": parts}], "user") == [QUESTION]


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"type": "image"}, "images"),
        ({"type": "image_url", "image_url": {"url": "tower.png"}}, "images"),
        ({"type": "input_audio"}, "audio"),
        ({"type": "video"}, "videos"),
        ({"type": "thinking", "thinking": "France …"}, "unsupported field"),
    ],
)
def test_other_parts_are_refused_by_name(part: Message, reason: str) -> None:
    message = refusal(QUESTION | {"content": [{"type": "text", "text": "What is this?"}, part]}, reason)
    assert f"a content part of the type '{part['type']}'" in message
    assert "not supported" in message


ROLE_AND_CONTENT = "expected an object with `role` and `content`, both strings"
PARTS = "expected a string, or parts of the form {'type': 'text', 'text': …}, both strings"


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ("Paris.", f"has the message 'Paris.'; {ROLE_AND_CONTENT}; {DROP}"),
        (None, f"has the message null; {ROLE_AND_CONTENT}; {DROP}"),
        ([ANSWER], f"has the message [{ANSWER}]; {ROLE_AND_CONTENT}; {DROP}"),
        (ANSWER | {"content": None}, f"has a message whose `content` is null; {ROLE_AND_CONTENT}; {DROP}"),
        (ANSWER | {"content": 5}, f"has a message whose `content` is 5; {ROLE_AND_CONTENT}; {DROP}"),
        (ANSWER | {"content": True}, f"has a message whose `content` is true; {ROLE_AND_CONTENT}; {DROP}"),
        (
            ANSWER | {"content": {"text": "a"}},
            f"has a message whose `content` is {{'text': 'a'}}; {ROLE_AND_CONTENT}; {DROP}",
        ),
        ({"role": "user"}, f"has a message without `content`, {{'role': 'user'}}; {ROLE_AND_CONTENT}; {DROP}"),
        ({"content": "Hi"}, f"has a message without `role`, {{'content': 'Hi'}}; {ROLE_AND_CONTENT}; {DROP}"),
        (ANSWER | {"role": None}, f"has a message whose `role` is null; {ROLE_AND_CONTENT}; {DROP}"),
        ({"from": "human"}, f"has a message without `role`, {{'from': 'human'}}; {ROLE_AND_CONTENT}; {DROP}"),
        (
            {"from": "human", "value": "Hi", "content": "Hi"},
            f"has a message without `role`, {{'from': 'human', 'value': 'Hi', 'content': 'Hi'}}; "
            f"{ROLE_AND_CONTENT}; {DROP}",
        ),
        ({"from": "gpt", "value": None}, f"has a message whose `value` is null; expected a string; {DROP}"),
        ({"from": "gpt", "value": ["a"]}, f"has a message whose `value` is ['a']; expected a string; {DROP}"),
        (ANSWER | {"content": ["a"]}, f"has a message with the content part 'a'; {PARTS}; {DROP}"),
        (
            ANSWER | {"content": [{"text": "a"}]},
            f"has a message with the content part {{'text': 'a'}}; {PARTS}; {DROP}",
        ),
        (
            ANSWER | {"content": [{"type": "text", "text": 5}]},
            f"has a message with the content part {{'type': 'text', 'text': 5}}; {PARTS}; {DROP}",
        ),
        (ANSWER | {"name": 5}, f"has a message whose `name` is 5; expected a string; {DROP}"),
    ],
)
def test_a_message_of_another_form_is_refused_by_what_is_wrong(message: Any, problem: str) -> None:
    assert refusal(message, "not messages") == f"line 2: `chosen` {problem}"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (False, "false"),
        (float("nan"), "NaN"),
        (5, "5"),
        ("a\nb", r"'a\nb'"),
        ("\ud83d", r"'\ud83d'"),
        ("x" * 59, "'" + "x" * 59 + "…"),
        ("x" * 58, "'" + "x" * 58 + "'"),
        ([1] * 100, f"[{'1, ' * 19}1,…"),
    ],
)
def test_a_value_is_shown_on_one_short_line(value: Any, text: str) -> None:
    assert shown(value) == text


@pytest.mark.parametrize(
    ("field", "reason"),
    [
        ("function_call", "unsupported field"),
        ("tools", "unsupported field"),
        ("tool_plan", "unsupported field"),
        ("refusal", "unsupported field"),
        ("audio", "audio"),
        ("images", "images"),
    ],
)
def test_a_field_that_would_be_lost_is_refused_by_name(field: str, reason: str) -> None:
    message = refusal({"role": "assistant", "content": None, field: {"name": "search"}}, reason)
    assert f"a message with `{field}`" in message


@pytest.mark.parametrize("role", ["function", "ipython", "human", "Assistant"])
def test_other_roles_are_refused_by_name(role: str) -> None:
    message = refusal(QUESTION | {"role": role}, "wrong role")
    assert f"the role '{role}'; expected one of system, developer, user, assistant, tool" in message


@pytest.mark.parametrize(
    ("role", "fix"),
    [
        ("human", "rename it to user"),
        ("gpt", "rename it to assistant"),
        ("Assistant", "rename it to assistant"),
        ("function", "rename it to tool"),
        ("narrator", DROP),
    ],
)
def test_the_role_that_is_meant_is_named(role: str, fix: str) -> None:
    assert refusal(QUESTION | {"role": role}, "wrong role").endswith(f"assistant, tool; {fix}")


FUNCTION = {"name": "search", "arguments": {"query": "capital", "page": None}}
CALL = {"type": "function", "function": FUNCTION}


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (CALL, CALL),
        (FUNCTION, CALL),
        (FUNCTION | {"id": "1"}, CALL | {"id": "1"}),
        (CALL | {"id": None}, CALL),
        ({"function": FUNCTION}, {"function": FUNCTION}),
        ({"id": "1", "function": FUNCTION | {"arguments": '{"query": "x"}'}}, None),
    ],
)
def test_a_tool_call_takes_the_form_that_templates_read(call: Any, expected: Any) -> None:
    (message,) = parse_messages("here", [{"role": "assistant", "tool_calls": [call]}], "assistant")
    expected = expected or {"id": "1", "function": {"name": "search", "arguments": {"query": "x"}}}
    assert message == {"role": "assistant", "content": "", "tool_calls": [expected]}


@pytest.mark.parametrize(
    "calls",
    [
        "search(capital)",
        {"function": FUNCTION},
        ["search"],
        [{"function": "search"}],
        [{"function": {"name": "search"}}],
        [{"name": "", "arguments": {}}],
        [{"name": "search", "arguments": "capital"}],
        [{"name": "search", "arguments": "[" * 100_000}],
        [{"type": "tool_use", "name": "search", "input": {}}],
    ],
)
def test_a_broken_tool_call_is_refused(calls: Any) -> None:
    assert "has the tool call" in refusal(ANSWER | {"tool_calls": calls}, "broken tool call")


def test_only_the_assistant_calls_tools() -> None:
    message = refusal(QUESTION | {"tool_calls": [CALL]}, "broken tool call")
    assert "tool calls in a message of the user" in message


MESSAGES = [
    {"role": "user", "content": 'It\'s a "{x}"\n {y} and \\d ü 🗼'},
    {"role": "assistant", "content": "Yes.", "tool_calls": None},
]
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(json.dumps(MESSAGES), id="JSON"),
        pytest.param("\n" + json.dumps(MESSAGES, ensure_ascii=False, indent=2) + "\n", id="indented JSON"),
        pytest.param(json.dumps(MESSAGES[0]), id="one message"),
        pytest.param(json.dumps([MESSAGES]), id="a list of conversations"),
        pytest.param(json.dumps({"messages": MESSAGES}), id="an object of messages"),
        pytest.param(json.dumps(json.dumps(MESSAGES)), id="JSON of JSON"),
        pytest.param("\n".join(map(json.dumps, MESSAGES)), id="a message a line"),
        pytest.param(json.dumps(SHAREGPT), id="ShareGPT"),
        pytest.param(repr(MESSAGES), id="repr"),
        pytest.param(repr(tuple(MESSAGES)), id="repr of a tuple"),
        pytest.param(str(np.array(MESSAGES, dtype=object)), id="numpy's str"),
        pytest.param(repr(np.array(MESSAGES, dtype=object)), id="numpy's repr"),
        pytest.param("[{'content': 'Hi', 'role': 'user', 'name': nan}]", id="pandas' nan"),
        pytest.param(json.dumps([{"role": "assistant", "tool_calls": []}]), id="a tool call"),
    ],
)
def test_text_that_is_messages_and_nothing_else(text: str) -> None:
    assert holds_messages(text)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="nothing"),
        pytest.param('"role": it plays one', id="prose"),
        pytest.param(json.dumps(MESSAGES) + "\n\nThis is a conversation in JSON.", id="messages, then prose"),
        pytest.param("As JSON: " + json.dumps(MESSAGES), id="prose, then messages"),
        pytest.param("```json\n" + json.dumps(MESSAGES) + "\n```", id="a code block"),
        pytest.param("[]", id="an empty list"),
        pytest.param('{"answer": 42}', id="an object"),
        pytest.param('[{"role": "engineer", "content": "steel"}]', id="another role"),
        pytest.param('{"role": "user", "permissions": ["read"]}', id="no content"),
        pytest.param('{"from": "Paris", "value": 3}', id="a journey"),
        pytest.param('{"model": "m", "messages": ' + json.dumps(MESSAGES) + "}", id="a request to an API"),
        pytest.param('[{"role": "user", "content": "Hi"}, 5]', id="messages and a number"),
        pytest.param("[" * 100_000 + '"role":', id="open brackets"),
        pytest.param("[" * 100_000 + '{"role": "user", "content": ""}' + "]" * 100_000, id="deep nesting"),
        pytest.param('{"role": "user", "content": "\0"}', id="a zero byte"),
        pytest.param('{"role": "user", "content": ' + "9" * 5000 + "}", id="5,000 digits"),
    ],
)
def test_text_that_is_something_else(text: str) -> None:
    assert not holds_messages(text)
