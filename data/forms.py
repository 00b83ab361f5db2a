"""The forms in which other programs keep preference pairs, brought into the columns prompt, chosen and rejected.

| form | prompt | responses |
| --- | --- | --- |
| ShareGPT, in LLaMA-Factory and axolotl | the messages in ``conversations``, ``conversation`` or ``messages`` | ``chosen``, ``rejected`` |
| Alpaca, in LLaMA-Factory | the turns in ``history``, then ``instruction``, a line break, ``input`` | ``chosen`` or ``output``, ``rejected`` |
| HH-RLHF | what both texts begin with: turns of ``Human:`` and ``Assistant:`` | ``chosen``, ``rejected`` |
| HH-RLHF with a prompt | the turns in ``prompt``, a text that ends with ``Assistant:`` | ``chosen``, ``rejected`` |

The first two count only where no ``prompt`` is, and where ``chosen`` and ``rejected`` are no whole conversations.
"""  # noqa: E501

import re
from collections.abc import Mapping
from typing import Any

from adpa.data.columns import ALPACA_PROMPT, CONVERSATION_COLUMNS, RESPONSE_COLUMNS, has_output_for_chosen
from adpa.data.messages import DROP, Message, is_empty, parse_messages, shown
from adpa.errors import RowError

_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")  # a speaker inside a paragraph is text


def in_columns(where: str, row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row of a form in the table with the columns of a pair; any other row as it is.

    Args:
        where: the place of the row, for errors.
        row: the row; a response may be missing.

    Raises:
        RowError: the row is of such a form, but has something in it that adpa does not support.
    """
    row = _split_dialogues(row)
    if not is_empty(row.get("prompt")) or any(_is_conversation(row.get(column)) for column in RESPONSE_COLUMNS):
        return row
    if column := _find_conversation(where, row):
        messages = parse_messages(f"{where}: `{column}`", row[column], "user")
        if messages[-1]["role"] == "assistant" and all(row.get(name) is None for name in RESPONSE_COLUMNS):
            messages = messages[:-1]  # a conversation of which only the prompt counts
        return {**row, "prompt": messages}
    if isinstance(row.get("instruction"), str) and not is_empty(row["instruction"]):
        return _from_alpaca(where, row)
    return row


def _is_conversation(response: Any) -> bool:
    return isinstance(response, list) and len(response) > 1


def _split_dialogues(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row whose prompt or responses are texts of ``Human:`` and ``Assistant:``, with messages in their place."""
    prompt, *responses = (_split_turns(row.get(name)) for name in ("prompt", *RESPONSE_COLUMNS))
    if prompt and prompt[-1] == {"role": "assistant", "content": ""}:
        answers = {name: row[name].strip() for name in RESPONSE_COLUMNS if isinstance(row.get(name), str)}
        row = {**row, "prompt": prompt[:-1], **answers}  # the space after `Assistant:` is no part of an answer
    return {**row, **dict(zip(RESPONSE_COLUMNS, responses, strict=True))} if all(responses) else row


def _split_turns(text: Any) -> list[Message]:
    """The turns of a text that begins with ``Human:`` and has an ``Assistant:``; none for anything else."""
    if not isinstance(text, str) or not text.lstrip().startswith("Human:"):
        return []
    _, *parts = _TURN.split(text)
    speakers, texts = parts[::2], parts[1::2]
    if "Assistant" not in speakers:
        return []
    return [
        {"role": _SPEAKERS[speaker], "content": each.strip()} for speaker, each in zip(speakers, texts, strict=True)
    ]


def _find_conversation(where: str, row: Mapping[str, Any]) -> str | None:
    """The column with the messages of a conversation. Columns of these names may hold something else."""
    columns = []
    for column in CONVERSATION_COLUMNS:
        value = row.get(column)
        if isinstance(value, list) and value and isinstance(value[0], Mapping) and {"role", "from"} & value[0].keys():
            columns.append(column)
    if len(columns) > 1 and any(row[column] != row[columns[0]] for column in columns):
        raise RowError(
            f"{where}: found the columns {' and '.join(f'`{column}`' for column in columns)}, which differ",
            "remove all but one, or give the prompt in `prompt`",
            "several conversations",
        )
    return columns[0] if columns else None


def _from_alpaca(where: str, row: Mapping[str, Any]) -> Mapping[str, Any]:
    rest = {name: value for name, value in row.items() if name not in ALPACA_PROMPT}
    if has_output_for_chosen(tuple(row)):
        rest["chosen"] = row["output"]
    texts = [row["instruction"]]
    if not is_empty(row.get("input")):
        if not isinstance(row["input"], str):
            raise RowError(f"{where}: `input` is {shown(row['input'])}; expected a string", DROP, "broken prompt")
        texts.append(row["input"])
    question = {"role": "user", "content": "\n".join(texts)}
    return rest | {"prompt": [*_earlier_turns(where, row.get("history")), question]}


def _earlier_turns(where: str, history: Any) -> list[Message]:
    if is_empty(history):
        return []
    if not isinstance(history, list) or not all(_is_turn(turn) for turn in history):
        raise RowError(
            f"{where}: `history` is {shown(history)}; expected a list of pairs, each a question and its answer",
            DROP,
            "broken prompt",
        )
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for turn in history for role, text in zip(roles, turn, strict=True)]


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)
