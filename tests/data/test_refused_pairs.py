import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tests.data.messages import CHOSEN, EARLIER_TURN, QUESTION, REJECTED, SYSTEM, Row
from tests.data.pairs import explicit, implicit, refusal

from adpa.data.preferences import parse_pair
from adpa.errors import RowError

SHAREGPT = [{"from": "human", "value": "Hello."}, {"from": "narrator", "value": "Hi!"}]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        pytest.param(["chosen", "rejected"], "found a list; expected an object", id="a list"),
        pytest.param("text", "found a string; expected an object", id="a string"),
        pytest.param(None, "found null; expected an object", id="null"),
        pytest.param(5, "found a number; expected an object", id="a number instead of a row"),
        pytest.param(
            {"prompt": "Hi", "chosen": "Hello"}, "found the columns prompt, chosen; expected `rejected`", id="no column"
        ),
        pytest.param(
            {"instruction": "Hi", "output": ["Hello"]}, "found the columns instruction, output", id="other columns"
        ),
        pytest.param(
            explicit([QUESTION]) | {"chosen": None},
            "`chosen` is null; expected chat messages or a string; mend or remove",
            id="chosen is null",
        ),
        pytest.param(
            explicit([QUESTION]) | {"rejected": None},
            "`rejected` is null; expected chat messages or a string; mend or remove",
            id="rejected is null",
        ),
        pytest.param(
            {"prompt": None, "chosen": "a", "rejected": "b"},
            "`prompt` is null, and `chosen` and `rejected` share no messages; write the prompt into it, or make",
            id="prompt is null",
        ),
        pytest.param(
            {"prompt": 0, "chosen": "a", "rejected": "b"},
            "`prompt` is 0, and `chosen` and `rejected` share no messages",
            id="prompt is zero",
        ),
        pytest.param(
            {"question": "Hi", "chosen": "a", "rejected": "b"},
            "found no `prompt` among the columns question, chosen, rejected, and `chosen` and `rejected` share no "
            "messages; pass --map prompt=question, or make both",
            id="prompt has another name",
        ),
        pytest.param(
            {"ask": "Hi", "chosen": "a", "rejected": "b"},
            "found no `prompt` among the columns ask, chosen, rejected, and `chosen` and `rejected` share no messages; "
            "add `prompt`, or make both",
            id="no prompt at all",
        ),
        pytest.param(explicit([QUESTION]) | {"chosen": True}, "`chosen` is true; expected chat messages", id="true"),
        pytest.param(
            explicit([QUESTION]) | {"chosen": float("nan")}, "`chosen` is NaN; expected chat messages", id="NaN"
        ),
        pytest.param(
            explicit([QUESTION]) | {"chosen": ["Paris."]}, "`chosen` has the message 'Paris.'; expected", id="texts"
        ),
        pytest.param(
            explicit([QUESTION]) | {"chosen": {"content": "Paris."}},
            "`chosen` is {'content': 'Paris.'}; expected chat messages",
            id="a message without its author",
        ),
        pytest.param(explicit([QUESTION]) | {"chosen": 5}, "`chosen` is 5; expected chat messages", id="a number"),
        pytest.param(explicit([QUESTION]) | {"chosen": []}, "`chosen` is []; expected", id="no messages"),
        pytest.param(explicit([QUESTION]) | {"chosen": ""}, "`chosen` is an empty response", id="empty string"),
        pytest.param(
            explicit([QUESTION]) | {"rejected": [REJECTED | {"content": " \n"}]},
            "`rejected` is an empty response",
            id="only white space",
        ),
        pytest.param(
            explicit([QUESTION]) | {"chosen": [QUESTION]},
            "after the prompt, `chosen` has messages of user; expected one message of the assistant",
            id="the user answers",
        ),
        pytest.param(
            explicit([QUESTION]) | {"rejected": [*EARLIER_TURN, REJECTED]},
            "after the prompt, `rejected` has messages of user, assistant, assistant",
            id="one whole conversation",
        ),
        pytest.param(
            explicit([QUESTION, CHOSEN]), "the prompt ends with the assistant's message", id="the prompt answers itself"
        ),
        pytest.param(
            {"chosen": [QUESTION, *EARLIER_TURN[::-1], CHOSEN], "rejected": [QUESTION, CHOSEN, QUESTION, REJECTED]},
            "after the prompt, `chosen` has messages of assistant, user, assistant",
            id="differ too early",
        ),
        pytest.param(
            {"chosen": [SYSTEM, QUESTION, CHOSEN], "rejected": [QUESTION, REJECTED]},
            "found no `prompt`, and `chosen` and `rejected` share no messages",
            id="differ from the start",
        ),
        pytest.param({"chosen": "Hello", "rejected": "Hi"}, "found no `prompt`", id="strings without a prompt"),
        pytest.param(explicit([]), "`prompt` is [], and `chosen` and `rejected` share no messages", id="empty prompt"),
        pytest.param(
            {"chosen": SHAREGPT, "rejected": SHAREGPT},
            "`chosen` has a message from 'narrator'; expected one of human, gpt",
            id="sharegpt",
        ),
        pytest.param(
            implicit([QUESTION]) | {"prompt": "Why?"},
            "`prompt` is not what `chosen` and `rejected` begin with",
            id="another prompt string",
        ),
        pytest.param(
            implicit([QUESTION]) | {"prompt": [SYSTEM, QUESTION]},
            "`prompt` is not what `chosen` and `rejected` begin with",
            id="other prompt messages",
        ),
        pytest.param(
            explicit([QUESTION | {"content": "The tower \ud83d"}]),
            "the text has half of a surrogate pair, '\\ud83d'",
            id="half a character",
        ),
    ],
)
def test_a_row_that_is_no_pair_is_refused_with_its_place(row: Any, problem: str) -> None:
    assert problem in refusal(row)


def test_an_error_of_reading_is_raised_where_the_pair_would_be() -> None:
    error = RowError("prefs.jsonl line 2: broken JSON", "mend it", "broken JSON")
    with pytest.raises(RowError) as caught:
        parse_pair("prefs.jsonl line 2", error)
    assert caught.value is error


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_a_blank_prompt_is_no_prompt(prompt: str) -> None:
    message = refusal({"prompt": prompt, "chosen": "Paris.", "rejected": "Lyon."}, "no prompt")
    assert f"`prompt` is {prompt!r}, and `chosen` and `rejected` share no messages" in message


def test_a_null_response_has_a_reason_of_its_own() -> None:
    refusal(explicit([QUESTION]) | {"rejected": None}, "null response")
    refusal({"prompt": "Hi", "chosen": "Hello"}, "missing column")


LONG = "x" * 5000


@pytest.mark.parametrize(
    "row",
    [
        {LONG: 1},
        {f"{number} {LONG}": number for number in range(500)},
        explicit([QUESTION]) | {"chosen": [LONG]},
        explicit([QUESTION]) | {"chosen": {"a": LONG}},
        explicit([QUESTION]) | {"chosen": [{"role": LONG, "content": "a"}]},
        explicit([QUESTION]) | {"chosen": [{"content": LONG}]},
        explicit([QUESTION]) | {"chosen": [CHOSEN | {"content": [{"type": LONG}]}]},
        explicit([QUESTION]) | {"chosen": [CHOSEN | {"content": [LONG]}]},
        explicit([QUESTION]) | {"chosen": [CHOSEN | {"name": [LONG]}]},
        explicit([QUESTION]) | {"chosen": [CHOSEN | {"tool_calls": LONG}]},
        explicit([QUESTION]) | {"system": [LONG]},
        explicit([QUESTION]) | {"tools": LONG},
        explicit([QUESTION]) | {"chat_template_kwargs": [LONG]},
    ],
)
def test_long_content_is_cut_in_the_message(row: Row) -> None:
    message = refusal(row)
    assert len(message) < 800
    assert "…" in message


@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected", "system"])
@pytest.mark.parametrize("write", [json.dumps, str, lambda messages: str(np.array(messages, dtype=object))])
def test_a_string_of_messages_is_refused(write: Callable[[Any], str], column: str) -> None:
    row = explicit([QUESTION]) | {column: write([QUESTION, CHOSEN])}
    message = refusal(row, "messages in a string")
    assert (
        f"`{column}` is a string that holds chat messages; write the messages themselves (apply json.loads" in message
    )


def test_two_strings_of_whole_conversations_are_refused_as_such() -> None:
    row = {"chosen": json.dumps([QUESTION, CHOSEN]), "rejected": json.dumps([QUESTION, REJECTED])}
    assert "`chosen` is a string that holds chat messages" in refusal(row)


def test_a_message_whose_content_is_messages_is_refused() -> None:
    text = json.dumps([QUESTION, CHOSEN])
    for column, message in (("prompt", QUESTION), ("chosen", CHOSEN), ("rejected", REJECTED)):
        refusal(explicit([QUESTION]) | {column: [message | {"content": text}]}, "messages in a string")


def test_an_answer_about_messages_is_an_answer() -> None:
    text = json.dumps([QUESTION, CHOSEN]) + " is a conversation."
    assert parse_pair("here", explicit([QUESTION]) | {"chosen": text}).chosen["content"] == text
