"""Control tokens: what a tokenizer marks as special, and what a chat template writes around messages.

A message that has one in its text could forge a turn, or was rendered already. Tags of thinking and of tools are part
of an assistant's answer, and none there.
"""

import json
import re
from collections.abc import Iterator, Mapping
from functools import cached_property

from adpa.data.chat_template import THINKING_FIELDS, ChatTemplate
from adpa.data.messages import Message

# What templates write around messages is a control token if it looks like one: <|user|>, <start_of_turn>, [INST].
TAG = re.compile(r"<[^<>\s]+>|<<[^<>\s]+>>|\[/?[A-Z_]+\]")
ANSWER_TAG = re.compile(r"think|thought|reason|tool|function", re.IGNORECASE)


class ControlTokens:
    """The control tokens of a chat template and its tokenizer."""

    def __init__(self, template: ChatTemplate) -> None:
        added = template.tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special} | {*template.tokenizer.all_special_tokens}
        around = template.surroundings
        written = {token.content for token in added if token.content.strip() and token.content in around}
        self.tokens = frozenset(special | written | {*TAG.findall(around)}) - {""}

    def find(self, message: Message) -> str | None:
        """The first control token in the texts of a message, if there is one."""
        pattern = self._in_answers if message["role"] == "assistant" else self._anywhere
        return next((match[0] for text in texts_of(message) if (match := pattern.search(text))), None)

    def find_in_tools(self, tools: object) -> str | None:
        """The first control token in the descriptions of tools."""
        match = self._anywhere.search(json.dumps(tools, ensure_ascii=False))
        return match[0] if match else None

    @cached_property
    def _anywhere(self) -> re.Pattern[str]:
        return _pattern(self.tokens)

    @cached_property
    def _in_answers(self) -> re.Pattern[str]:
        return _pattern(frozenset(token for token in self.tokens if not ANSWER_TAG.search(token)))


def texts_of(message: Message) -> Iterator[str]:
    """The texts of a message: its content, its thinking, and the texts in its tool calls."""
    yield message["content"]
    yield from (message[name] for name in THINKING_FIELDS if name in message)
    for call in message.get("tool_calls", ()):
        yield from leaves(call["function"])


def leaves(value: object) -> Iterator[str]:
    """The texts and names in a JSON value, in order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield name
            yield from leaves(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from leaves(inner)


def _pattern(tokens: frozenset[str]) -> re.Pattern[str]:
    """Matches any of the tokens; the look at the first character makes the search fast where there is none."""
    if not tokens:
        return re.compile("(?!)")
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))
    first = "".join(sorted({re.escape(token[0]) for token in tokens}))
    return re.compile(f"(?=[{first}])(?:{'|'.join(map(re.escape, longest_first))})")
