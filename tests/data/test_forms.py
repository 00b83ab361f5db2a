"""Rows of other programs' forms are the same pairs as rows with prompt, chosen and rejected."""

import json
from typing import Any

import pytest
from tests.data.messages import CHOSEN, EARLIER_TURN, QUESTION, REJECTED, SYSTEM, Row
from tests.data.pairs import explicit, implicit, refusal

from adpa.data.preferences import PreferencePair, parse_pair

AUTHORS = {"user": "human", "assistant": "gpt", "system": "system"}


def sharegpt(messages: list[Row]) -> list[Row]:
    return [{"from": AUTHORS[message["role"]], "value": message["content"]} for message in messages]


def pair(row: Row) -> PreferencePair:
    return parse_pair("here", row)


PROMPT = [SYSTEM, *EARLIER_TURN, QUESTION]
ANSWERS: dict[str, Row] = {
    "messages": {"chosen": sharegpt([CHOSEN])[0], "rejected": sharegpt([REJECTED])[0]},
    "lists": {"chosen": sharegpt([CHOSEN]), "rejected": sharegpt([REJECTED])},
    "strings": {"chosen": CHOSEN["content"], "rejected": REJECTED["content"]},
    "OpenAI's": {"chosen": CHOSEN, "rejected": [REJECTED]},
}


@pytest.mark.parametrize("answers", ANSWERS)
@pytest.mark.parametrize("column", ["conversations", "conversation", "messages"])
def test_a_conversation_of_sharegpt_is_the_prompt(column: str, answers: str) -> None:
    """As in LLaMA-Factory (`conversations`) and axolotl (`messages`)."""
    for messages in (sharegpt(PROMPT), PROMPT):
        assert pair({column: messages, "id": 5} | ANSWERS[answers]) == pair(explicit(PROMPT))


def test_whole_conversations_of_sharegpt_are_a_pair() -> None:
    whole = {name: sharegpt(messages) for name, messages in implicit(PROMPT).items() if isinstance(messages, list)}
    assert pair(whole) == pair(explicit(PROMPT))
    assert pair(whole | {"conversations": sharegpt(PROMPT[:2])}) == pair(explicit(PROMPT)), "as `messages` always was"


def test_sharegpt_has_a_system_column_and_tools() -> None:
    call = {"name": "search", "arguments": {"query": "capital"}}
    tools = [{"type": "function", "function": {"name": "search"}}]
    turns = [{"from": "function_call", "value": json.dumps(call)}, {"from": "observation", "value": "Paris"}]
    row = {"conversations": [*sharegpt([QUESTION]), *turns], "tools": json.dumps(tools), "system": SYSTEM["content"]}
    found = pair(row | ANSWERS["messages"])
    calling = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
    assert found.prompt == (SYSTEM, QUESTION, calling, {"role": "tool", "content": "Paris"})
    assert found.tools == tuple(tools)


def test_a_response_of_sharegpt_may_call_a_function() -> None:
    call = {"name": "search", "arguments": {"query": "capital"}}
    row = {"conversations": sharegpt([QUESTION]), "rejected": sharegpt([REJECTED])[0]}
    row["chosen"] = {"from": "function_call", "value": json.dumps(call)}
    assert pair(row).chosen["tool_calls"] == [{"type": "function", "function": call}]


def test_a_prompt_goes_before_a_conversation() -> None:
    """As in UltraFeedback, whose `messages` are the prompt and the chosen response."""
    assert pair(explicit([QUESTION]) | {"messages": [*EARLIER_TURN], "conversation": [{"input": "Hi"}]}) == pair(
        explicit([QUESTION])
    )


def test_a_conversation_of_another_kind_is_metadata() -> None:
    """As in argilla's Capybara sets, whose `conversation` has the keys `input` and `output`."""
    row = implicit(PROMPT) | {"conversation": [{"input": "Hello.", "output": "Hi!"}], "messages": 5}
    assert pair(row) == pair(explicit(PROMPT))


@pytest.mark.parametrize(
    ("changed", "problem", "reason"),
    [
        (
            {"messages": EARLIER_TURN},
            "found the columns `conversations` and `messages`, which differ; remove all but one",
            "several conversations",
        ),
        ({"conversations": PROMPT[:3]}, "the prompt ends with the assistant's message; expected the user's", None),
        (
            {"conversations": [{"from": "human"}]},
            "`conversations` has a message without `role`, {'from': 'human'}",
            "not messages",
        ),
        (
            {"conversations": [{"from": "narrator", "value": "Once"}]},
            "`conversations` has a message from 'narrator'",
            "wrong role",
        ),
        ({"conversations": json.dumps(PROMPT)}, "`conversations` is a string that holds chat messages", None),
        ({"conversations": [], "messages": []}, "found no `prompt`", "no prompt"),
        ({"chosen": sharegpt([QUESTION])[0]}, "after the prompt, `chosen` has messages of user", "wrong role"),
        ({"rejected": None}, "`rejected` is null", "null response"),
        ({"images": ["a.png"]}, "found the column `images`", "images"),
    ],
)
def test_a_conversation_that_is_no_prompt_is_refused(changed: Row, problem: str, reason: str | None) -> None:
    assert problem in refusal({"conversations": sharegpt(PROMPT)} | ANSWERS["messages"] | changed, reason)


INSTRUCTION, INPUT = "Name the capital of the country.", "France"
TASK = {"role": "user", "content": f"{INSTRUCTION}\n{INPUT}"}
ALPACA = {"instruction": INSTRUCTION, "input": INPUT, **ANSWERS["strings"]}


def test_instruction_and_input_are_the_prompt_on_two_lines() -> None:
    """As LLaMA-Factory joins them."""
    assert pair(ALPACA) == pair(explicit([TASK]))
    assert pair(ALPACA | {"chosen": CHOSEN, "rejected": [REJECTED]}) == pair(explicit([TASK]))


@pytest.mark.parametrize("empty", [{"input": ""}, {"input": None}, {"input": " "}, {"history": []}, {"system": ""}])
def test_an_instruction_alone_is_the_prompt(empty: Row) -> None:
    row = {"instruction": QUESTION["content"], **ANSWERS["strings"]}
    assert pair(row | empty) == pair(row) == pair(explicit([QUESTION]))


def test_history_and_system_stand_before_the_instruction() -> None:
    history = [[message["content"] for message in EARLIER_TURN]]
    row = {"instruction": QUESTION["content"], "history": history, "system": SYSTEM["content"], **ANSWERS["strings"]}
    assert pair(row) == pair(explicit(PROMPT))


@pytest.mark.parametrize("rejected", [REJECTED["content"], REJECTED, [REJECTED], sharegpt([REJECTED])])
def test_output_is_the_chosen_response_beside_rejected(rejected: Any) -> None:
    row = {"instruction": INSTRUCTION, "input": INPUT, "output": CHOSEN["content"], "rejected": rejected}
    assert pair(row) == pair(explicit([TASK]))


def test_output_is_metadata_beside_chosen_and_rejected() -> None:
    assert pair(ALPACA | {"output": "Marseille."}) == pair(explicit([TASK]))


@pytest.mark.parametrize(
    ("row", "problem", "reason"),
    [
        (ALPACA | {"prompt": "Why?"}, "found the column `instruction`, which is not supported", "unsupported column"),
        (ALPACA | {"context": "Europe"}, "found the column `context`, which is not supported", "unsupported column"),
        (ALPACA | {"input": ["France"]}, "`input` is ['France']; expected a string", "broken prompt"),
        (ALPACA | {"history": "Hello."}, "`history` is 'Hello.'; expected a list of pairs", "broken prompt"),
        (ALPACA | {"history": [["Hello."]]}, "`history` is [['Hello.']]; expected a list of pairs", "broken prompt"),
        (ALPACA | {"history": [["Hello.", None]]}, "expected a list of pairs", "broken prompt"),
        (ALPACA | {"instruction": " "}, "found no `prompt`", "no prompt"),
        (
            {"prompt": "Why?", "output": "So.", "rejected": "No."},
            "found the columns prompt, output, rejected; expected `chosen`",
            "missing column",
        ),
        (
            {"instruction": "Why?", "output": "So.", "chosen": None, "rejected": "No."},
            "`chosen` is null; expected",
            "null response",
        ),
        (
            implicit([QUESTION]) | {"instruction": "Be brief."},
            "found the column `instruction`, which is not supported and is not in the prompt",
            "unsupported column",
        ),
    ],
)
def test_an_instruction_of_which_the_meaning_is_not_clear_is_refused(row: Row, problem: str, reason: str) -> None:
    assert problem in refusal(row, reason)


def dialogue(messages: list[Row]) -> str:
    names = {"user": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{names[message['role']]}: {message['content']}" for message in messages)


TURNS = [*EARLIER_TURN, QUESTION]
HH = {"chosen": dialogue([*TURNS, CHOSEN]), "rejected": dialogue([*TURNS, REJECTED])}


def test_two_texts_of_human_and_assistant_are_conversations() -> None:
    """As in Anthropic/hh-rlhf."""
    assert pair(HH) == pair(explicit(TURNS))


def test_a_speaker_inside_a_paragraph_is_text() -> None:
    question = {"role": "user", "content": "Who said it?\nHuman: me.\nAssistant: or me, Human: x"}
    row = {"chosen": dialogue([question, CHOSEN]), "rejected": dialogue([question, REJECTED])}
    assert pair(row) == pair(explicit([question]))


def test_answers_of_several_paragraphs_stay_whole() -> None:
    chosen = CHOSEN | {"content": "Paris.\n\nIt is on the Seine:\n\n- left bank"}
    row = {"chosen": dialogue([QUESTION, chosen]), "rejected": HH["rejected"]}
    assert pair({**row, "rejected": dialogue([QUESTION, REJECTED])}).chosen == chosen


@pytest.mark.parametrize("ending", ["\n\nAssistant:", "\n\nAssistant: ", " \n\nAssistant:"])
def test_a_prompt_that_ends_with_the_assistants_name_is_a_conversation(ending: str) -> None:
    """As in Dahoas/full-hh-rlhf, whose answers stand alone."""
    row = {"prompt": dialogue(TURNS) + ending, "response": " Paris.", "chosen": "Paris.", "rejected": [REJECTED]}
    assert pair(row) == pair(explicit(TURNS))
    assert pair(HH | {"prompt": dialogue(TURNS) + ending}) == pair(explicit(TURNS)), "with whole texts beside it"


def test_the_space_after_the_assistants_name_is_no_part_of_an_answer() -> None:
    """As in Dahoas/full-hh-rlhf, where answers begin with it."""
    row = {"prompt": dialogue(TURNS) + "\n\nAssistant:", "chosen": " Paris.", "rejected": f" {REJECTED['content']} \n"}
    assert pair(row) == pair(explicit(TURNS))
    assert pair({"prompt": "Why?", "chosen": " So.", "rejected": "No."}).chosen["content"] == " So.", "ordinary rows"


def test_other_texts_about_humans_are_texts() -> None:
    for prompt in ("Human: or machine?", "\n\nHuman: Hi\n\nAssistant: Hello", "Is this Human: a\n\nAssistant:"):
        row = {"prompt": prompt, "chosen": "Human: yes", "rejected": "Human: no\n\nAssistant: yes"}
        assert pair(row).prompt == ({"role": "user", "content": prompt},)
        assert pair(row).rejected["content"] == row["rejected"]


@pytest.mark.parametrize(
    ("row", "problem", "reason"),
    [
        (
            {"chosen": dialogue([QUESTION, CHOSEN, QUESTION, CHOSEN]), "rejected": dialogue([QUESTION, REJECTED])},
            "after the prompt, `chosen` has messages of assistant, user, assistant; expected one message of",
            "responses differ too early",
        ),
        (HH | {"rejected": dialogue([*TURNS, REJECTED | {"content": ""}])}, "`rejected` is an empty response", None),
        (HH | {"chosen": dialogue(TURNS)}, "the prompt ends with the assistant's message", "wrong role"),
        (HH | {"rejected": "Lyon."}, "found no `prompt`, and `chosen` and `rejected` share no", "no prompt"),
        (HH | {"prompt": "Why?"}, "`prompt` is not what `chosen` and `rejected` begin with", None),
    ],
)
def test_texts_that_are_no_pair_are_refused(row: Row, problem: str, reason: str | None) -> None:
    assert problem in refusal(row, reason)


def test_a_rendered_row_has_no_other_form() -> None:
    row = {"prompt": dialogue(TURNS) + "\n\nAssistant:", "chosen": "Paris.", "rejected": "Lyon."}
    assert parse_pair("here", row, rendered=True).prompt == row["prompt"]
    assert "`prompt` is null; expected a rendered prompt" in refusal(HH, rendered=True)
