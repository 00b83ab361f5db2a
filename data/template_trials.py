"""The messages with which a chat template is tried; their marks show what it writes, and where."""

from typing import Any

from adpa.data.messages import Message

MARKER, OTHER_MARKER = "adpa", "adpb"
QUESTION: Message = {"role": "user", "content": "hello"}
MARKED_QUESTION: Message = {"role": "user", "content": OTHER_MARKER}
ANSWER: Message = {"role": "assistant", "content": MARKER}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "look", "description": "", "parameters": {"type": "object", "properties": {}}},
}
CALL_ID = "call12345"  # some templates want nine characters


def marked_call(mark: str, name: str = "argument") -> Message:
    """A tool call with one argument, whose value is a mark."""
    function = {"name": "look", "arguments": {name: mark}}
    call = {"id": CALL_ID, "type": "function", "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


CALL = marked_call(MARKER, OTHER_MARKER)
RESULT: Message = {"role": "tool", "content": OTHER_MARKER, "name": "look", "tool_call_id": CALL_ID}


class TemplateRefusalError(Exception):
    """A chat template that cannot render a conversation; the message has its reason in one line."""
