"""Chat templates: rendering, the end of a turn, and what a template does with roles, tools and thinking.

A template is code that somebody wrote. What it does is tried with marked messages. Only the names of its arguments are
read from its source.
"""

import datetime
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, TemplateSyntaxError
from jinja2.meta import find_undeclared_variables

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
    marked_call,
)
from adpa.data.turn_end import TurnEnd, find_call_end, find_turn_end

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_DATE = datetime.date(2024, 7, 26)  # the date that Llama's templates use by default
GENERATION_TAG = re.compile(r"{%-?\s*(end)?generation\s*-?%}")  # a tag of transformers, around what is trained on
OPEN_THINKING = re.compile(
    r"(<(?!\|?(?:/|end))[^<>\s/]*(?:think|thought|reasoning)[^<>\s/]*>|\[(?:\w+_)?THINK(?:ING)?\])\s*$", re.IGNORECASE
)
THINKING_FIELDS = ("reasoning_content", "thinking", "reasoning")  # of an assistant's message


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template and its arguments.

    Attributes:
        tokenizer: the tokenizer.
        arguments: arguments of the template for every conversation, such as ``enable_thinking``.
        eos_token_ids: the ids at which the model stops generating, by its generation_config.
    """

    tokenizer: "PreTrainedTokenizerBase"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    eos_token_ids: Sequence[int] = ()

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        arguments: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """A conversation as text; ``add_generation_prompt`` appends the start of an assistant's turn.

        A template that writes the date (Llama 3.1 and later) gets ``TEMPLATE_DATE``: the same conversation must give
        the same tokens on any day.

        Raises:
            TemplateRefusalError: the template cannot render it.
        """
        return self._render(self._form.apply(messages), tools, arguments or {}, add_generation_prompt)

    def _render(self, messages: Sequence[Message], tools: Any, arguments: Mapping[str, Any], prompt: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=prompt,
                strftime_now=TEMPLATE_DATE.strftime,
                **{**self.arguments, **arguments},
            )
        except Exception as error:  # a template can raise anything, as any program
            reason = " ".join(str(error).split())
            name = type(error).__name__
            raise TemplateRefusalError(reason if name == "TemplateError" and reason else f"{name}: {reason}") from error
        assert isinstance(text, str), "one conversation renders to one text"
        return text

    @cached_property
    def turn_end(self) -> TurnEnd:
        """The end of an answer; see ``find_turn_end``."""
        return find_turn_end(self)

    @cached_property
    def call_end(self) -> TurnEnd:
        """The end of a tool call; see ``find_call_end``."""
        return find_call_end(self)

    @cached_property
    def stops(self) -> frozenset[int]:
        """The ids that end generation, as far as they are known."""
        known = {*self.eos_token_ids, self.tokenizer.eos_token_id}
        return frozenset(index for index in known if index is not None)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids of the tokens that the tokenizer marks as special."""
        added = self.tokenizer.added_tokens_decoder.items()
        return frozenset({index for index, token in added if token.special} | {*self.tokenizer.all_special_ids})

    def takes_argument(self, name: str) -> bool:
        """Whether the template has a variable of this name that it does not set itself."""
        return name in self.variables

    @cached_property
    def variables(self) -> frozenset[str]:
        """The variables of the template that it does not set itself."""
        environment = Environment(extensions=["jinja2.ext.loopcontrols"])  # only parses
        try:
            trees = [environment.parse(GENERATION_TAG.sub("", source)) for source in self._sources]
        except TemplateSyntaxError:  # whoever renders it will be told
            return frozenset()
        return frozenset(name for tree in trees for name in find_undeclared_variables(tree))

    @cached_property
    def _sources(self) -> tuple[str, ...]:
        template = self.tokenizer.chat_template
        return tuple(template.values()) if isinstance(template, dict) else (template or "",)

    def left_out(
        self, messages: Sequence[Message], tools: object = None, arguments: Mapping[str, Any] | None = None
    ) -> str | None:
        """What the template leaves out of conversations like this one: a role, or tool calls.

        Conversations are alike if they have the same roles and numbers of tool calls, tools or none, and the same
        arguments. One of them is tried, with a mark in every message and every call. If the template refuses it, the
        answer is None: the template will refuse the row as well, or write it.
        """
        roles = tuple((message["role"], len(message.get("tool_calls", ()))) for message in messages)
        shape = roles, bool(tools), json.dumps(arguments, sort_keys=True)
        if shape not in self._shapes:
            self._shapes[shape] = self._try_roles(roles, [TOOL] if tools else None, arguments)
        return self._shapes[shape]

    @cached_property
    def _shapes(self) -> dict[tuple[object, ...], str | None]:
        return {}

    def _try_roles(
        self, roles: Sequence[tuple[str, int]], tools: Any, arguments: Mapping[str, Any] | None
    ) -> str | None:
        messages: list[Message] = []
        kinds: dict[str, str] = {}
        for place, (role, calls) in enumerate(roles):
            marks = [f"adp{place}c{call}c" for call in range(calls or 1)]
            kinds |= dict.fromkeys(marks, "tool calls" if calls else f"messages with the role {role!r}")
            message = (RESULT if role == "tool" else {}) | {"role": role, "content": "" if calls else marks[0]}
            if calls:
                message["tool_calls"] = [call for mark in marks for call in marked_call(mark)["tool_calls"]]
            messages.append(message)
        try:
            text = self.render(messages, tools, arguments, add_generation_prompt=roles[-1][0] != "assistant")
        except TemplateRefusalError:
            return None
        return next((kind for mark, kind in kinds.items() if mark not in text), None)

    @cached_property
    def _form(self) -> "_Form":
        """The form of messages that the template reads: the first with which most trials are written whole."""
        forms = [_Form(*choice) for choice in itertools.product((False, True), repeat=3)]
        return max(forms, key=self._try_form)  # the first of equals

    def _try_form(self, form: "_Form") -> tuple[bool, bool, bool]:
        def written(*messages: Message, tools: Sequence[dict[str, Any]] | None = None) -> str:
            try:
                return self._render(form.apply(messages), tools, {}, False)
            except TemplateRefusalError:
                return ""

        turns, call = written(MARKED_QUESTION, ANSWER), written(QUESTION, CALL, tools=[TOOL])
        whole = all(mark in call for mark in (MARKER, OTHER_MARKER)) and f"'{OTHER_MARKER}'" not in call
        result = written(QUESTION, CALL, RESULT, tools=[TOOL])
        return MARKER in turns and OTHER_MARKER in turns, whole, bool(result)


@dataclass(frozen=True)
class _Form:
    """How messages are handed to a template; plain is as ``parse_messages`` makes them.

    Attributes:
        parts: contents are lists of parts.
        text_arguments: a tool call's arguments are JSON text.
        no_content: a tool call without words has no content.
    """

    parts: bool
    text_arguments: bool
    no_content: bool

    def apply(self, messages: Sequence[Message]) -> Sequence[Message]:
        if self.parts or any("tool_calls" in message for message in messages):
            return [self._apply(message) for message in messages]
        return messages

    def _apply(self, message: Message) -> Message:
        changed = dict(message)
        if self.parts:
            changed["content"] = [{"type": "text", "text": message["content"]}]
        if "tool_calls" in message and self.text_arguments:
            changed["tool_calls"] = [
                call | {"function": call["function"] | {"arguments": _json(call["function"]["arguments"])}}
                for call in message["tool_calls"]
            ]
        if "tool_calls" in message and self.no_content and not message["content"]:
            changed["content"] = None
        return changed


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
