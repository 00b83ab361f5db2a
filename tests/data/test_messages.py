import json

import numpy as np
import pytest

from adpa.data.messages import holds_messages

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
