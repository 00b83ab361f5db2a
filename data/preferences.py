"""Turns a row of preference data into a prompt and two responses.

A row has ``prompt``, ``chosen`` and ``rejected``, each chat messages or a string. Without ``prompt``, ``chosen`` and
``rejected`` are whole conversations, and the messages that both begin with are the prompt. A string is one message: the
user's for a prompt, the assistant's for a response. ``system`` becomes the first message; ``tools`` and
``chat_template_kwargs`` are for the chat template. ``adpa.data.forms`` has the forms of other programs.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adpa.data.columns import (
    CONVERSATION_COLUMNS,
    MEDIA_COLUMNS,
    PROMPT_COLUMNS,
    READ_COLUMNS,
    RESPONSE_COLUMNS,
    TEMPLATE_COLUMNS,
    lacks_responses,
    missing_columns,
    printable,
    suggest_map,
)
from adpa.data.forms import in_columns
from adpa.data.messages import DROP, Message, holds_messages, is_empty, parse_messages, shown, unsupported
from adpa.errors import RowError

Row = Mapping[str, Any] | RowError  # or the error with which it was read

JSON_TYPES = {list: "a list", str: "a string", int: "a number", float: "a number", bool: "true or false"}

# The arguments of a chat template that adpa decides itself, or that would change how it calls the tokenizer.
RESERVED_TEMPLATE_KWARGS = {
    *("self", "messages", "conversation", "conversations", "tools", "chat_template", "add_generation_prompt"),
    *("continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs", "processor_kwargs", "strftime_now", "raise_exception"),
}


@dataclass(frozen=True)
class PreferencePair:
    """A prompt, the preferred response and the other one.

    Attributes:
        where: the source of the pair, for messages: a file and its line, or a row number.
        example_id: digest of the pair's content; the same pair has the same id in any file.
        prompt: the messages before the response, the last of which is not the assistant's; or, for a prompt that is
            rendered already, its text.
        chosen: the preferred response, a message of the assistant; empty for a prompt alone.
        rejected: the other response, a message of the assistant; empty for a prompt alone.
        tools: the tools' JSON schemas, for the chat template.
        chat_template_kwargs: further arguments of the chat template.
    """

    where: str
    example_id: str
    prompt: tuple[Message, ...] | str
    chosen: Message
    rejected: Message
    tools: tuple[dict[str, Any], ...] | None
    chat_template_kwargs: dict[str, Any]

    @property
    def responses(self) -> dict[str, Message]:
        """The two responses by their columns; none for a prompt alone."""
        return {"chosen": self.chosen, "rejected": self.rejected} if self.chosen else {}


def parse_pair(where: str, row: Row, rendered: bool = False, prompts_alone: bool = False) -> PreferencePair:
    """Turns one row of any of the supported forms into a ``PreferencePair``.

    Args:
        where: the place of the row, for errors.
        row: the row, or the error with which it was read.
        rendered: the prompt is a string with the chat template's markers, and stays as it is.
        prompts_alone: take a row without responses, too.

    Raises:
        RowError: the row is no preference pair, or has something that adpa does not support.
    """
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, Mapping):
        found = JSON_TYPES.get(type(row), "null")
        raise RowError(f"{where}: found {found}; expected an object with `chosen` and `rejected`", DROP)
    try:
        pair = row if rendered else in_columns(where, row)
        alone = prompts_alone and _is_prompt_alone(pair)
        for column in () if alone else RESPONSE_COLUMNS:
            if pair.get(column) is None:
                raise _no_response(where, row, column)
        _check_columns(where, pair)
        return _parse_rendered(where, pair, alone) if rendered else _parse_chat(where, pair, alone)
    except RecursionError as error:
        raise RowError(f"{where}: the row is nested too deeply", DROP, "broken JSON") from error


def _is_prompt_alone(row: Mapping[str, Any]) -> bool:
    names = [name for name in row if name not in RESPONSE_COLUMNS or row[name] is not None]
    return lacks_responses(tuple(names))


def _check_columns(where: str, row: Mapping[str, Any]) -> None:
    for column, value in row.items():
        if column in MEDIA_COLUMNS and not is_empty(value):
            raise unsupported(f"{where}: found the column `{column}`", column)
    conversations = CONVERSATION_COLUMNS if is_empty(row.get("prompt")) else ()
    for column in ("prompt", "system", *conversations, *RESPONSE_COLUMNS):
        if isinstance(row.get(column), str):
            _refuse_messages(where, column, row[column])


def _no_response(where: str, row: Mapping[str, Any], column: str) -> RowError:
    if wrong := missing_columns(tuple(row)):
        return RowError(f"{where}: {wrong[0]}", wrong[1], "missing column")
    return RowError(f"{where}: `{column}` is null; expected chat messages or a string", DROP, "null response")


def _refuse_messages(where: str, column: str, text: str) -> None:
    if holds_messages(text):
        raise RowError(
            f"{where}: `{column}` is a string that holds chat messages",
            "write the messages themselves (apply json.loads or ast.literal_eval to the column)",
            "messages in a string",
        )


def _parse_chat(where: str, row: Mapping[str, Any], alone: bool) -> PreferencePair:
    columns = () if alone else RESPONSE_COLUMNS
    conversations = [parse_messages(f"{where}: `{column}`", row[column], "assistant") for column in columns]
    shared = _shared_prefix(*conversations) if conversations else []
    prompt = _with_system(where, row.get("system"), _parse_prompt(where, row, shared, alone))
    for column, conversation in zip(columns, conversations, strict=True):
        _check_response(where, column, conversation[len(shared) :])
    questions = [message["content"] for message in prompt if message["role"] == "user"]
    if len(questions) == 1:
        _refuse_messages(where, "prompt", questions[0])
    _check_prompt_columns(where, row, " ".join(message["content"] for message in prompt))
    tools = _parse_tools(where, row.get("tools"))
    kwargs = _parse_kwargs(where, row.get("chat_template_kwargs"))
    chosen, rejected = [conversation[-1] for conversation in conversations] or ({}, {})
    example_id = _example_id(where, prompt, chosen, rejected, tools, kwargs)
    return PreferencePair(where, example_id, tuple(prompt), chosen, rejected, tools, kwargs)


def _parse_rendered(where: str, row: Mapping[str, Any], alone: bool) -> PreferencePair:
    prompt = row.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise RowError(f"{where}: `prompt` is {shown(prompt)}; expected a rendered prompt, a string", DROP, "no prompt")
    for column in TEMPLATE_COLUMNS:
        if not is_empty(row.get(column)):
            raise RowError(
                f"{where}: found the column `{column}`, but the prompt is rendered already",
                "remove the column, or leave --rendered out",
                "unsupported column",
            )
    _check_prompt_columns(where, row, prompt)
    columns = () if alone else RESPONSE_COLUMNS
    responses = [_parse_rendered_response(where, column, row[column], prompt) for column in columns]
    chosen, rejected = responses or ({}, {})
    example_id = _example_id(where, prompt, chosen, rejected, None, {})
    return PreferencePair(where, example_id, prompt, chosen, rejected, None, {})


def _parse_rendered_response(where: str, column: str, value: Any, prompt: str) -> Message:
    messages = parse_messages(f"{where}: `{column}`", value, "assistant")
    _check_response(where, column, messages)
    response = messages[0]
    if fields := [field for field in response if field not in ("role", "content")]:
        raise RowError(
            f"{where}: `{column}` has a message with `{fields[0]}`, but the prompt is rendered already",
            "write the response as one string, or leave --rendered out",
            "unsupported field",
        )
    if response["content"].startswith(prompt):
        raise RowError(
            f"{where}: `{column}` begins with the whole prompt",
            "leave only the response in it",
            "prompt in a response",
        )
    return response


def _shared_prefix(chosen: list[Message], rejected: list[Message]) -> list[Message]:
    length = 0
    while length < min(len(chosen), len(rejected)) - 1 and chosen[length] == rejected[length]:
        length += 1
    return chosen[:length]


def _parse_prompt(where: str, row: Mapping[str, Any], shared: list[Message], alone: bool) -> list[Message]:
    value = row.get("prompt")
    if is_empty(value):
        prompt = shared
        if not prompt:
            found, fix = "found no `prompt`", suggest_map(tuple(row)) or "add `prompt`"
            if "prompt" in row:
                found, fix = f"`prompt` is {shown(value)}", "write the prompt into it"
            elif not row.keys() <= READ_COLUMNS:
                found += f" among the columns {printable(row)}"
            if not alone:
                found += ", and `chosen` and `rejected` share no messages"
                fix += ", or make both whole conversations with the same beginning"
            raise RowError(f"{where}: {found}", fix, "no prompt")
    else:
        prompt = parse_messages(f"{where}: `prompt`", value, "user")
        if shared and isinstance(value, str) and any(message["content"] == value for message in shared):
            prompt = shared
        elif shared and prompt != shared:
            raise RowError(
                f"{where}: `prompt` is not what `chosen` and `rejected` begin with",
                "drop `prompt`, or leave only the response in `chosen` and `rejected`",
                "prompt and responses differ",
            )
    if prompt[-1]["role"] == "assistant":
        raise RowError(
            f"{where}: the prompt ends with the assistant's message; expected the user's", DROP, "wrong role"
        )
    return prompt


def _with_system(where: str, system: Any, prompt: list[Message]) -> list[Message]:
    if is_empty(system):
        return prompt
    if not isinstance(system, str):
        raise RowError(f"{where}: `system` is {shown(system)}; expected a string", DROP, "system message")
    if prompt[0]["role"] != "system":
        return [{"role": "system", "content": system}, *prompt]
    if prompt[0]["content"] != system:
        raise RowError(
            f"{where}: `system` is not the system message that the conversation begins with",
            "remove one of them",
            "system message",
        )
    return prompt


def _check_response(where: str, column: str, response: list[Message]) -> None:
    roles = [message["role"] for message in response]
    if roles != ["assistant"]:
        raise RowError(
            f"{where}: after the prompt, `{column}` has messages of {', '.join(roles)}; "
            "expected one message of the assistant",
            DROP,
            "responses differ too early" if roles[:2] == ["assistant", "user"] else "wrong role",
        )
    if not response[0]["content"].strip() and "tool_calls" not in response[0]:
        raise RowError(f"{where}: `{column}` is an empty response", DROP, "empty response")
    _refuse_messages(where, column, response[0]["content"])


def _check_prompt_columns(where: str, row: Mapping[str, Any], prompt: str) -> None:
    """Refuses a further column of the prompt, unless its text stands in the prompt already."""
    for column, value in row.items():
        if column not in PROMPT_COLUMNS or is_empty(value):
            continue
        if not isinstance(value, str) or "".join(value.split()) not in "".join(prompt.split()):
            raise RowError(
                f"{where}: found the column `{column}`, which is not supported and is not in the prompt",
                f"{PROMPT_COLUMNS[column]}, or remove the column",
                "unsupported column",
            )


def _parse_tools(where: str, value: Any) -> tuple[dict[str, Any], ...] | None:
    if is_empty(value):
        return None
    tools = _decode(where, "tools", value)
    tools = [_decode(where, "tools", tool) for tool in tools] if isinstance(tools, list) else tools
    if is_empty(tools):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) and tool for tool in tools):
        raise RowError(f"{where}: `tools` is {shown(value)}; expected a list of JSON schemas", DROP, "broken tools")
    return tuple(dict(tool) for tool in tools)


def _parse_kwargs(where: str, value: Any) -> dict[str, Any]:
    if is_empty(value):
        return {}
    kwargs = _decode(where, "chat_template_kwargs", value)
    if is_empty(kwargs):
        return {}
    if not isinstance(kwargs, Mapping):
        raise RowError(
            f"{where}: `chat_template_kwargs` is {shown(value)}; expected an object", DROP, "broken template arguments"
        )
    for name in kwargs:
        if name in RESERVED_TEMPLATE_KWARGS:
            raise RowError(
                f"{where}: `chat_template_kwargs` has `{name}`, which adpa sets itself",
                "remove it",
                "broken template arguments",
            )
    return dict(kwargs)


def _decode(where: str, column: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowError(
            f"{where}: `{column}` is the string {shown(value)}; expected JSON", DROP, "broken JSON"
        ) from error


def _example_id(
    where: str,
    prompt: list[Message] | str,
    chosen: Message,
    rejected: Message,
    tools: tuple[dict[str, Any], ...] | None,
    kwargs: dict[str, Any],
) -> str:
    content: list[Any] = [prompt]
    responses = (chosen, rejected) if chosen else ()
    content += [message["content"] if len(message) == 2 else message for message in responses]
    content += [{name: value} for name, value in (("tools", tools), ("chat_template_kwargs", kwargs)) if value]
    try:
        identity = json.dumps(content, ensure_ascii=False, sort_keys=True)
        return hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()
    except TypeError as error:  # dates and bytes out of Arrow files
        raise RowError(f"{where}: found a value that JSON does not have: {error}", DROP, "broken JSON") from error
    except UnicodeEncodeError as error:
        raise RowError(
            f"{where}: the text has half of a surrogate pair, {identity[error.start]!r}, which is no character",
            DROP,
            "half a surrogate pair",
        ) from error
