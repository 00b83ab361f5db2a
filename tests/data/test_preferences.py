import json
from collections.abc import Callable
from typing import Any

import pytest
from tests.data.messages import CHOSEN, EARLIER_TURN, QUESTION, REJECTED, SYSTEM, Row
from tests.data.pairs import explicit, implicit, refusal

from adpa.data.preferences import PreferencePair, parse_pair

CONVERSATIONS = {
    "one question": [QUESTION],
    "a system message": [SYSTEM, QUESTION],
    "several turns": [*EARLIER_TURN, QUESTION],
    "several turns after a system message": [SYSTEM, *EARLIER_TURN, QUESTION],
}


def responses_as_strings(prompt: list[Row]) -> Row:
    return {"prompt": prompt, "chosen": CHOSEN["content"], "rejected": REJECTED["content"]}


def prompt_and_whole_conversations(prompt: list[Row]) -> Row:
    return {"prompt": prompt} | implicit(prompt)


def prompt_string_and_whole_conversations(prompt: list[Row]) -> Row:
    """As in HuggingFaceH4/ultrafeedback_binarized, which has `messages` too."""
    first_question = next(message["content"] for message in prompt if message["role"] == "user")
    return {"prompt_id": "f0e3", "prompt": first_question, "messages": [*prompt, CHOSEN]} | implicit(prompt)


FORMS = [
    explicit,
    responses_as_strings,
    implicit,
    prompt_and_whole_conversations,
    prompt_string_and_whole_conversations,
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_every_form_of_a_row_gives_the_same_pair(form: Callable[[list[Row]], Row], conversation: str) -> None:
    prompt = CONVERSATIONS[conversation]
    pair = parse_pair("here", form(prompt))
    assert pair == PreferencePair("here", pair.example_id, tuple(prompt), CHOSEN, REJECTED, None, {})
    assert pair.example_id == parse_pair("there", explicit(prompt)).example_id


def test_a_row_of_three_strings_is_a_question_and_two_answers() -> None:
    row = {"prompt": QUESTION["content"], "chosen": CHOSEN["content"], "rejected": REJECTED["content"]}
    assert parse_pair("here", row) == parse_pair("here", explicit([QUESTION]))


def test_equal_answers_to_one_question_still_are_a_pair() -> None:
    pair = parse_pair("here", {"chosen": [QUESTION, CHOSEN], "rejected": [QUESTION, CHOSEN]})
    assert (pair.prompt, pair.chosen, pair.rejected) == ((QUESTION,), CHOSEN, CHOSEN)


@pytest.mark.parametrize("extra", [{"weight": 1.0}, {"tool_calls": None, "name": ""}, {"images": [], "audio": {}}])
def test_metadata_and_empty_fields_of_a_message_are_left_out(extra: Row) -> None:
    row = {"prompt": [QUESTION | extra], "chosen": [CHOSEN | extra], "rejected": [extra | REJECTED]}
    assert parse_pair("here", row) == parse_pair("here", explicit([QUESTION]))


@pytest.mark.parametrize(
    ("row", "example_id"),
    [
        (explicit([QUESTION]), "179afcea97c4a83d"),
        (implicit([SYSTEM, QUESTION]), "b4750a9630380b55"),
        ({"prompt": "What\nis é?", "chosen": "Paris.", "rejected": " x\t"}, "f5fc3f387567c907"),
    ],
)
def test_the_example_ids_of_ordinary_rows_never_change(row: Row, example_id: str) -> None:
    assert parse_pair("here", row).example_id == example_id


@pytest.mark.parametrize(
    "changed",
    [
        explicit([SYSTEM, QUESTION]),
        explicit([QUESTION | {"content": "What is the capital of Gaul?"}]),
        explicit([QUESTION]) | {"chosen": "Paris!"},
        explicit([QUESTION]) | {"rejected": "Lyon."},
        {"prompt": [QUESTION], "chosen": [REJECTED], "rejected": [CHOSEN]},
        explicit([QUESTION | {"name": "Ann"}]),
        explicit([QUESTION]) | {"chosen": [CHOSEN | {"reasoning_content": "France, its capital."}]},
        explicit([QUESTION]) | {"tools": [{"name": "search"}]},
        explicit([QUESTION]) | {"chat_template_kwargs": {"enable_thinking": False}},
    ],
)
def test_the_example_id_changes_with_the_content(changed: Row) -> None:
    assert parse_pair("here", changed).example_id != parse_pair("here", explicit([QUESTION])).example_id


@pytest.mark.parametrize("form", [explicit, responses_as_strings, implicit, prompt_and_whole_conversations])
def test_a_system_column_is_the_first_message(form: Callable[[list[Row]], Row]) -> None:
    row = form([*EARLIER_TURN, QUESTION]) | {"system": SYSTEM["content"]}
    assert parse_pair("here", row) == parse_pair("here", explicit([SYSTEM, *EARLIER_TURN, QUESTION]))


def test_a_system_column_joins_a_prompt_that_is_a_string() -> None:
    row = {"system": SYSTEM["content"], "prompt": QUESTION["content"], "chosen": "Paris.", "rejected": "Lyon."}
    assert parse_pair("here", row).prompt == (SYSTEM, QUESTION)


@pytest.mark.parametrize("system", [None, "", " \n"])
def test_an_empty_system_column_is_no_message(system: str | None) -> None:
    assert parse_pair("here", explicit([QUESTION]) | {"system": system}).prompt == (QUESTION,)


def test_a_system_column_may_repeat_the_system_message() -> None:
    assert parse_pair("here", implicit([SYSTEM, QUESTION]) | {"system": SYSTEM["content"]}).prompt == (SYSTEM, QUESTION)


def test_a_system_column_that_contradicts_is_refused() -> None:
    message = refusal(explicit([SYSTEM, QUESTION]) | {"system": "Answer at length."}, "system message")
    assert "`system` is not the system message that the conversation begins with" in message
    assert "`system` is 5; expected a string" in refusal(explicit([QUESTION]) | {"system": 5})


TOOL = {"type": "function", "function": {"name": "search", "parameters": {"type": "object", "required": None}}}


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)]])
def test_tools_are_schemas_or_their_json(tools: Any) -> None:
    assert parse_pair("here", explicit([QUESTION]) | {"tools": tools}).tools == (TOOL,)


@pytest.mark.parametrize("tools", [None, [], "", "[]", "null"])
def test_empty_tools_are_none(tools: Any) -> None:
    assert parse_pair("here", explicit([QUESTION]) | {"tools": tools}) == parse_pair("here", explicit([QUESTION]))


@pytest.mark.parametrize(
    ("tools", "reason"),
    [("search, read", "broken JSON"), (TOOL, "broken tools"), (["search"], "broken JSON"), ([5], "broken tools")],
)
def test_tools_that_are_no_schemas_are_refused(tools: Any, reason: str) -> None:
    assert "`tools` is " in refusal(explicit([QUESTION]) | {"tools": tools}, reason)


@pytest.mark.parametrize("kwargs", [{"enable_thinking": False, "documents": []}, '{"enable_thinking": false}'])
def test_template_arguments_are_an_object_or_its_json(kwargs: Any) -> None:
    pair = parse_pair("here", explicit([QUESTION]) | {"chat_template_kwargs": kwargs})
    assert pair.chat_template_kwargs["enable_thinking"] is False


@pytest.mark.parametrize("kwargs", [None, {}, "", "{}", "null"])
def test_empty_template_arguments_are_none(kwargs: Any) -> None:
    row = explicit([QUESTION]) | {"chat_template_kwargs": kwargs}
    assert parse_pair("here", row) == parse_pair("here", explicit([QUESTION]))


@pytest.mark.parametrize("name", ["messages", "tools", "chat_template", "add_generation_prompt", "tokenize", "self"])
def test_template_arguments_that_adpa_sets_itself_are_refused(name: str) -> None:
    row = explicit([QUESTION]) | {"chat_template_kwargs": {name: None}}
    assert f"`chat_template_kwargs` has `{name}`, which adpa sets itself" in refusal(row, "broken template arguments")


@pytest.mark.parametrize("kwargs", ["thinking", [1], 5])
def test_template_arguments_of_another_form_are_refused(kwargs: Any) -> None:
    assert "`chat_template_kwargs` is " in refusal(explicit([QUESTION]) | {"chat_template_kwargs": kwargs})


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        ("images", "images"),
        ("image", "images"),
        ("videos", "videos"),
        ("audio", "audio"),
        ("documents", "unsupported column"),
        ("history", "unsupported column"),
        ("context", "unsupported column"),
        ("system_prompt", "unsupported column"),
        ("functions", "unsupported column"),
    ],
)
def test_a_column_that_the_model_should_read_is_refused_by_name(column: str, reason: str) -> None:
    for value in (["something"], "something"):
        assert f"found the column `{column}`" in refusal(explicit([QUESTION]) | {column: value}, reason)
    for empty in json.loads('[null, [], "", {}, NaN]'):
        assert parse_pair("here", explicit([QUESTION]) | {column: empty}) == parse_pair("here", explicit([QUESTION]))


def test_a_column_that_repeats_the_prompt_does_no_harm() -> None:
    """As in Magpie's preference sets, whose `instruction` is the user's message."""
    row = implicit([SYSTEM, QUESTION]) | {"instruction": QUESTION["content"], "system_prompt": SYSTEM["content"] + "\n"}
    assert parse_pair("here", row) == parse_pair("here", explicit([SYSTEM, QUESTION]))


def test_metadata_is_ignored() -> None:
    metadata = {"source": "a", "id": 3, "margin": 0.5, "score_chosen": 8.0, "messages": [QUESTION], "model": "m"}
    assert parse_pair("here", explicit([QUESTION]) | metadata) == parse_pair("here", explicit([QUESTION]))


FUNCTION = {"name": "search", "arguments": {"query": "capital"}}
CALLING: Row = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": FUNCTION}]}
RESULT: Row = {"role": "tool", "content": "Paris", "name": "search", "tool_call_id": "1"}


@pytest.mark.parametrize("form", [explicit, implicit, prompt_and_whole_conversations])
def test_a_call_and_its_result_are_part_of_the_prompt(form: Callable[[list[Row]], Row]) -> None:
    row = form([QUESTION, CALLING | {"content": None}, RESULT])
    assert parse_pair("here", row).prompt == (QUESTION, CALLING, RESULT)


@pytest.mark.parametrize("content", [None, "", "I shall look."])
def test_a_response_may_call_tools_with_or_without_words(content: str | None) -> None:
    pair = parse_pair("here", explicit([QUESTION]) | {"chosen": [CALLING | {"content": content}]})
    assert pair.chosen == CALLING | {"content": content or ""}


def test_a_response_of_several_messages_is_refused() -> None:
    row = explicit([QUESTION]) | {"chosen": [CALLING, RESULT, CHOSEN]}
    assert "after the prompt, `chosen` has messages of assistant, tool, assistant" in refusal(row, "wrong role")


def test_values_that_json_does_not_have_are_refused() -> None:
    call = {"name": "search", "arguments": {"query": b"capital"}}
    row = explicit([QUESTION]) | {"chosen": [CALLING | {"tool_calls": [call]}]}
    assert "Object of type bytes is not JSON serializable" in refusal(row, "broken JSON")


RENDERED: Row = {"prompt": "<|user|>Hi<|end|><|assistant|>", "chosen": "Hello", "rejected": [REJECTED]}


def test_a_rendered_prompt_stays_as_it_is() -> None:
    pair = parse_pair("here", RENDERED, rendered=True)
    chosen = {"role": "assistant", "content": "Hello"}
    assert pair == PreferencePair("here", pair.example_id, RENDERED["prompt"], chosen, REJECTED, None, {})
    assert pair.example_id != parse_pair("here", RENDERED).example_id


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"prompt": [QUESTION]}, "`prompt` is [{'role': 'user'"),
        ({"prompt": None}, "`prompt` is null; expected a rendered prompt, a string"),
        ({"prompt": json.dumps([QUESTION])}, "`prompt` is a string that holds chat messages"),
        ({"chosen": [QUESTION, CHOSEN]}, "after the prompt, `chosen` has messages of user, assistant"),
        ({"chosen": RENDERED["prompt"] + "Hello"}, "`chosen` begins with the whole prompt; leave only the response"),
        ({"rejected": " "}, "`rejected` is an empty response"),
        ({"rejected": [REJECTED | {"thinking": "Hm."}]}, "`rejected` has a message with `thinking`, but the prompt"),
        ({"system": "Be brief."}, "found the column `system`, but the prompt is rendered already"),
        ({"tools": [TOOL]}, "found the column `tools`, but the prompt is rendered already"),
        ({"chat_template_kwargs": {"a": 1}}, "found the column `chat_template_kwargs`, but"),
        ({"images": ["tower.png"]}, "found the column `images`; images are not supported"),
    ],
)
def test_rendered_rows_that_do_not_fit_are_refused(changed: Row, problem: str) -> None:
    assert problem in refusal(RENDERED | changed, rendered=True)
