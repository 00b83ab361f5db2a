"""Chat messages: checked, and brought into the form that chat templates read."""

import ast
import json
import math
import re
import warnings
from collections.abc import Mapping
from typing import Any

from adpa.errors import RowError

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
TEXT_FIELDS = {"tool_call_id", "name", "reasoning_content", "thinking", "reasoning"}
# What some template would write, and adpa does not pass on.
UNSUPPORTED_FIELDS = {
    *("image", "images", "image_url", "video", "videos", "audio", "audios", "files", "attachments", "documents"),
    *("function_call", "function_calls", "functions", "tools", "tool_plan", "tool_responses", "tool_results"),
    *("refusal", "reasoning_details", "thinking_blocks", "thoughts"),
}
ROLE_NAMES = {"human": "user", "function": "tool"} | dict.fromkeys(("gpt", "chatgpt", "bot", "model"), "assistant")
# The authors of ShareGPT's messages, which have `from` and `value`; a function_call is JSON of the assistant's call.
AUTHORS = {role: role for role in ROLES} | {"human": "user", "observation": "tool", "function_call": "assistant"}
AUTHORS |= {name: role for name, role in ROLE_NAMES.items() if role == "assistant"}
DROP = "mend or remove the row, or pass --drop-invalid"

_AUTHORS = {*ROLES, "human", "gpt", "chatgpt", "bot", "model", "function", "observation", "function_call", "ipython"}
_MAYBE_MESSAGES = re.compile(r"""\s*(?:[\w.]*array\()?["'\[({].*["'](?:role|from)\\*["']\s*:""", re.DOTALL)


def parse_messages(place: str, value: Any, role: str) -> list[Message]:
    """Messages as chat templates read them; a string is one message of ``role``.

    ShareGPT's messages, with ``from`` and ``value``, become messages with ``role`` and ``content``. A message keeps its
    role, its content as one string, and the other fields that templates know, where they are not empty. A tool call has
    the form ``{"type": "function", "function": {"name": …, "arguments": {…}}}``.

    Args:
        place: the row and the column, for errors.
        value: the column's value.
        role: the author of a string.

    Raises:
        RowError: the value is no list of messages, or has something in it that adpa does not support.
    """
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, Mapping) and {"role", "from"} & value.keys():
        value = [value]
    if not isinstance(value, list) or not value:
        raise RowError(f"{place} is {shown(value)}; expected chat messages or a string", DROP, "not messages")
    return [_parse_message(place, message) for message in value]


def _parse_message(place: str, message: Any) -> Message:
    if (
        isinstance(message, Mapping)
        and {"from", "value"} <= message.keys()
        and not {"role", "content"} & message.keys()
    ):
        message = _from_sharegpt(place, message)
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise _no_message(place, message, "role")
    role = message["role"]
    if role not in ROLES:
        known = role.lower() if role.lower() in ROLES else ROLE_NAMES.get(role.lower(), "")
        raise RowError(
            f"{place} has a message with the role {shown(role)}; expected one of {', '.join(ROLES)}",
            f"rename it to {known}" if known else DROP,
            "wrong role",
        )
    parsed: Message = {"role": role, "content": ""}
    for field, value in message.items():
        if field in ("role", "content") or is_empty(value):
            continue
        if field in UNSUPPORTED_FIELDS:
            raise unsupported(f"{place} has a message with `{field}`", field)
        if field == "tool_calls":
            parsed[field] = _parse_tool_calls(place, role, value)
        elif field in TEXT_FIELDS:
            if not isinstance(value, str):
                raise RowError(
                    f"{place} has a message whose `{field}` is {shown(value)}; expected a string", DROP, "not messages"
                )
            parsed[field] = value
    parsed["content"] = _parse_content(place, message)
    return parsed


def _from_sharegpt(place: str, message: Mapping[str, Any]) -> Message:
    author, value = message["from"], message["value"]
    if not isinstance(author, str) or author not in AUTHORS:
        expected = "human, gpt, system, tool, observation, function_call"
        raise RowError(f"{place} has a message from {shown(author)}; expected one of {expected}", DROP, "wrong role")
    if not isinstance(value, str):
        raise RowError(
            f"{place} has a message whose `value` is {shown(value)}; expected a string", DROP, "not messages"
        )
    parsed = {name: field for name, field in message.items() if name not in ("from", "value")}
    parsed |= {"role": AUTHORS[author], "content": value}
    if author == "function_call":
        try:
            calls = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise _broken_tool_call(place, value) from error
        parsed |= {"content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}
    return parsed


def _parse_content(place: str, message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if content is None and not is_empty(message.get("tool_calls")):
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _no_message(place, message, "content")
    for part in content:
        if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
            raise _no_part(place, part)
        if part["type"] != "text":
            raise unsupported(f"{place} has a content part of the type {shown(part['type'])}", part["type"])
        if not isinstance(part.get("text"), str):
            raise _no_part(place, part)
    return "".join(part["text"] for part in content)


def _no_message(place: str, message: Any, field: str) -> RowError:
    if not isinstance(message, Mapping):
        problem = f"has the message {shown(message)}"
    elif field in message:
        problem = f"has a message whose `{field}` is {shown(message[field])}"
    else:
        problem = f"has a message without `{field}`, {shown(message)}"
    return RowError(
        f"{place} {problem}; expected an object with `role` and `content`, both strings", DROP, "not messages"
    )


def _no_part(place: str, part: Any) -> RowError:
    expected = "expected a string, or parts of the form {'type': 'text', 'text': …}, both strings"
    return RowError(f"{place} has a message with the content part {shown(part)}; {expected}", DROP, "not messages")


def unsupported(problem: str, name: str) -> RowError:
    """The error for a column, a field or a part of a message that adpa does not take. ``name`` is its name or type."""
    for word, medium in (("image", "images"), ("pixel", "images"), ("video", "videos"), ("audio", "audio")):
        if word in name:
            return RowError(f"{problem}; {medium} {'is' if medium == 'audio' else 'are'} not supported", DROP, medium)
    return RowError(f"{problem}, which is not supported", DROP, "unsupported field")


def shown(value: Any, most: int = 60) -> str:
    """A value for one line of text, as JSON names it; a long one is cut."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, float) and math.isnan(value):
        return "NaN"
    text = repr(value[: most + 1] if isinstance(value, str) else value)
    return text if len(text) <= most else f"{text[:most]}…"


def is_empty(value: Any) -> bool:
    """Whether a column or field counts as absent: null or NaN, blank, or without elements."""
    if isinstance(value, str):
        return not value or value.isspace()
    return not value or (isinstance(value, float) and math.isnan(value))


def _parse_tool_calls(place: str, role: str, calls: Any) -> list[dict[str, Any]]:
    if role != "assistant":
        raise RowError(f"{place} has tool calls in a message of the {role}", DROP, "broken tool call")
    if not isinstance(calls, list):
        raise RowError(f"{place} has the tool calls {shown(calls)}; expected a list", DROP, "broken tool call")
    return [_parse_tool_call(place, call) for call in calls]


def _parse_tool_call(place: str, call: Any) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise _broken_tool_call(place, call)
    parsed = {key: value for key, value in call.items() if value is not None}
    if "function" not in parsed:  # the short form {"name": …, "arguments": …}
        outer = {"type": "function"} | {key: parsed.pop(key) for key in ("type", "id") if key in parsed}
        parsed = {**outer, "function": parsed}
    function = parsed["function"]
    if parsed.get("type", "function") != "function" or not isinstance(function, Mapping):
        raise _broken_tool_call(place, call)
    arguments = function.get("arguments")
    if isinstance(arguments, str):  # as OpenAI writes them; a template would quote them a second time
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise _broken_tool_call(place, call) from error
    if not isinstance(arguments, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise _broken_tool_call(place, call)
    return {**parsed, "function": {**function, "arguments": arguments}}


def _broken_tool_call(place: str, call: Any) -> RowError:
    return RowError(
        f"{place} has the tool call {shown(call, 80)}; "
        'expected {"type": "function", "function": {"name": …, "arguments": {…}}}',
        DROP,
        "broken tool call",
    )


def holds_messages(text: str) -> bool:
    """Whether the whole of a text is chat messages, as JSON or as Python or numpy print them."""
    if not (("role" in text or "from" in text) and _MAYBE_MESSAGES.match(text)):
        return False  # almost every text, and soon
    separated = re.sub(r"}\s+{", "}, {", text.strip())  # numpy prints no commas
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # JSON has escapes that Python warns of
            return _is_conversation(ast.parse(separated, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # all that Python's parser raises
        return False


def _is_conversation(node: ast.expr) -> bool:
    match node:
        case ast.Dict(keys=[ast.Constant(value="messages" | "conversations")], values=[ast.List() as messages]):
            return _is_conversation(messages)
        case ast.Dict():
            return _is_message(node)
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            return bool(elements) and all(map(_is_conversation, elements))
        case ast.Call(func=ast.Name(id="array") | ast.Attribute(attr="array"), args=[first, *_]):
            return _is_conversation(first)
        case ast.Constant(value=str(text)):  # JSON that was written as JSON again
            return holds_messages(text)
        case _:
            return False


def _is_message(node: ast.Dict) -> bool:
    pairs = zip(node.keys, node.values, strict=True)
    fields = {key.value: value for key, value in pairs if isinstance(key, ast.Constant)}
    for author, text in (("role", "content"), ("from", "value")):
        name = fields.get(author)
        if isinstance(name, ast.Constant) and str(name.value).lower() in _AUTHORS:
            return text in fields or "tool_calls" in fields
    return False
