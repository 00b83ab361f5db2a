"""Control tokens: what a tokenizer marks as special, and what a chat template writes around messages.

A message that has one in its text could forge a turn, or was rendered already. In an assistant's answer, tags of
thinking and tools are ordinary text.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from adpa.data.chat_template import THINKING_FIELDS, ChatTemplate
from adpa.data.messages import Message
from adpa.data.template_trials import (
    ANSWER,
    CALL,
    MARKED_QUESTION,
    MARKER,
    OTHER_MARKER,
    QUESTION,
    RESULT,
    TOOL,
    TemplateRefusalError,
)
from adpa.data.vocabulary import matching_any, special_tokens

# What templates write around messages is a control token if it looks like one: <|user|>, <start_of_turn>, [INST].
TAG = re.compile(r"<[^<>\s]+>|<<[^<>\s]+>>|\[/?[A-Z_]+\]")
ANSWER_TAG = re.compile(r"think|thought|reason|tool|function", re.IGNORECASE)
TRIAL_WORDS = re.compile(
    f"{MARKER}|{OTHER_MARKER}|{TOOL['function']['name']}"
)  # what the messages bring, as in <function=look>
SYSTEM: Message = {"role": "system", "content": MARKER}
THOUGHT: Message = ANSWER | dict.fromkeys(THINKING_FIELDS, OTHER_MARKER)


class ControlTokens:
    """The control tokens of a chat template and its tokenizer."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        added = template.tokenizer.added_tokens_decoder.values()
        self._added = frozenset(token.content for token in added if token.content.strip())
        around = self._around([MARKED_QUESTION, ANSWER, MARKED_QUESTION])
        around |= self._around([SYSTEM, MARKED_QUESTION], line_before=True)
        around |= self._around([QUESTION, ANSWER], line_before=True)
        with_tools = self._around([MARKED_QUESTION, CALL, RESULT], [TOOL])
        self.tokens = special_tokens(template.tokenizer) | around | with_tools
        inside = self._around([QUESTION, CALL], [TOOL], line_before=True)
        inside |= self._around([QUESTION, THOUGHT], line_before=True)
        ends = {*template.tokenizer.convert_ids_to_tokens(sorted(template.stops)), *template.call_end.texts}
        self._of_answers = inside - around - ends  # tags of tool calls and of thinking

    def _around(self, messages: Sequence[Message], tools: Any = None, line_before: bool = False) -> frozenset[str]:
        """What the template writes from the first mark on, or from the line before it.

        Further up may stand a text of the template's own, such as instructions.
        """
        try:
            text = self._template.render(messages, tools, add_generation_prompt=messages[-1]["role"] != "assistant")
        except TemplateRefusalError:
            return frozenset()
        places = [place for mark in (MARKER, OTHER_MARKER) if (place := text.find(mark)) >= 0]
        if not places:
            return frozenset()
        start = text[: min(places)].rstrip().rfind("\n") + 1 if line_before else min(places)
        around = text[start:]
        names = {token for token in self._added if token in around and not token.strip().isalnum()}  # not plain words
        written = names | {*TAG.findall(around)}
        return frozenset(token for token in written if not TRIAL_WORDS.search(token))

    def find(self, message: Message) -> str | None:
        """The first control token in the texts of a message, if there is one."""
        pattern = self._in_answers if message["role"] == "assistant" else self._anywhere
        return next((match[0] for text in texts_of(message) if (match := pattern.search(text))), None)

    def find_in_json(self, value: object) -> str | None:
        """The first control token in a JSON value."""
        match = self._anywhere.search(json.dumps(value, ensure_ascii=False))
        return match[0] if match else None

    @cached_property
    def _anywhere(self) -> re.Pattern[str]:
        return matching_any(self.tokens)

    @cached_property
    def _in_answers(self) -> re.Pattern[str]:
        return matching_any(
            frozenset(token for token in self.tokens - self._of_answers if not ANSWER_TAG.search(token))
        )


def texts_of(message: Message) -> Iterator[str]:
    """The texts of a message: its content, its thinking, the texts in its tool calls, and names."""
    yield message["content"]
    yield from (message[name] for name in THINKING_FIELDS if name in message)
    for call in message.get("tool_calls", ()):
        yield from leaves(call)
    yield from (message[name] for name in ("name", "tool_call_id") if name in message)


def leaves(value: object) -> Iterator[str]:
    """The texts, names and numbers in a JSON value, in order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield name
            yield from leaves(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from leaves(inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):  # true and null have other names elsewhere
        yield json.dumps(value)
