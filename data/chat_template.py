"""Chat templates: rendering, the end of a turn, and what a template does with roles, tools and thinking.

A template is code that somebody wrote. What it does is tried with marked messages, once for each template, and never
guessed from its source.
"""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jinja2 import Environment
from jinja2.meta import find_undeclared_variables

from adpa.data.messages import Message
from adpa.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_DATE = datetime.date(2024, 7, 26)  # the date that Llama's templates use by default
MARKER, OTHER_MARKER = "adpa", "adpb"
QUESTION: Message = {"role": "user", "content": "hello"}
TOOL = {
    "type": "function",
    "function": {"name": "look", "description": "", "parameters": {"type": "object", "properties": {}}},
}
RESULT_OF_CALL = {"name": "look", "tool_call_id": "call12345"}  # some templates want nine characters
GENERATION_TAG = re.compile(r"{%-?\s*(end)?generation\s*-?%}")  # a tag of transformers, around what is trained on
THINKING_SWITCHES = ("enable_thinking", "thinking")
THINKING_FIELDS = ("reasoning_content", "thinking", "reasoning")  # of an assistant's message


class TemplateRefusalError(Exception):
    """A chat template that cannot render a conversation; the message has its reason in one line."""


@dataclass(frozen=True)
class TurnEnd:
    """How a chat template ends an assistant's turn.

    Attributes:
        token_id: id of the end-of-turn token, the last token of a response.
        trailing: number of further tokens that the template writes.
        text: the text between the assistant's words and the trailing tokens; most often the end-of-turn token.
        texts: ``text``, and each special token in it: what may end a response that has its end of turn already.
    """

    token_id: int
    trailing: int
    text: str
    texts: tuple[str, ...]


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
        if any("tool_calls" in message for message in messages) and self._wants_text_arguments:
            messages = [_with_text_arguments(message) for message in messages]
        return self._render(messages, tools, {**self.arguments, **(arguments or {})}, add_generation_prompt)

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        arguments: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                strftime_now=TEMPLATE_DATE.strftime,
                **(self.arguments if arguments is None else arguments),
            )
        except Exception as error:  # a template can raise anything, as any program
            reason = " ".join(str(error).split())
            name = type(error).__name__
            raise TemplateRefusalError(reason if name == "TemplateError" and reason else f"{name}: {reason}") from error
        assert isinstance(text, str), "one conversation renders to one text"
        return text

    @cached_property
    def turn_end(self) -> TurnEnd:
        """The end of an assistant's turn.

        A response runs to the token that ends generation. Two special tokens may end a turn: the first of them that
        is an end of generation counts, or else the first.

        Raises:
            ModelError: the tokenizer has no chat template, or it cannot render an answer, or it ends the turn without a
                special token.
        """
        name = self.tokenizer.name_or_path
        if not self.tokenizer.chat_template:
            raise ModelError(
                f"{name}: the tokenizer has no chat template",
                "set tokenizer.chat_template and save it beside the teacher",
            )
        try:
            _, seen, suffix = self._render([QUESTION, {"role": "assistant", "content": MARKER}]).rpartition(MARKER)
            problem = "" if seen else "changes the assistant's text"
        except TemplateRefusalError as error:
            problem = f"refuses a question and its answer: {error}"
        if problem:
            raise ModelError(f"{name}: the chat template {problem}", "mend the teacher's chat template")
        ids = self.tokenizer(suffix, add_special_tokens=False)["input_ids"]
        place = self._find_end(ids)
        if place is None:
            raise ModelError(
                f"{name}: the chat template ends the assistant's turn with no special token",
                "end it with eos_token in the template",
            )
        tokens = [
            str(self.tokenizer.convert_ids_to_tokens(index)) for index in ids[: place + 1] if index in self.special_ids
        ]
        text = suffix[: suffix.index(tokens[-1]) + len(tokens[-1])]
        return TurnEnd(ids[place], len(ids) - place - 1, text, tuple(dict.fromkeys([text, *tokens])))

    def _find_end(self, ids: Sequence[int]) -> int | None:
        """The place of the end-of-turn token in the tokens after an assistant's words."""
        special = [place for place, token_id in enumerate(ids) if token_id in self.special_ids]
        if not special:
            return None
        first = special[0]
        run = [place for index, place in enumerate(special) if place == first + index]
        stops = {*self.eos_token_ids, self.tokenizer.eos_token_id}
        ending = [place for place in run if ids[place] in stops]
        if not ending and self.eos_token_ids:
            ending = [place for place in special if ids[place] in stops]
        return ending[0] if ending else first

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids of the tokens that the tokenizer marks as special."""
        added = self.tokenizer.added_tokens_decoder.items()
        return frozenset({index for index, token in added if token.special} | {*self.tokenizer.all_special_ids})

    def reads_field(self, name: str) -> bool:
        """Whether the template's source has the name of a message's field."""
        return any(re.search(rf"\b{name}\b", source) for source in self._sources)

    def takes_argument(self, name: str) -> bool:
        """Whether the template has a variable of this name that it does not set itself."""
        return name in self._variables

    @cached_property
    def _variables(self) -> frozenset[str]:
        environment = Environment(extensions=["jinja2.ext.loopcontrols"])  # only parses
        sources = (GENERATION_TAG.sub("", source) for source in self._sources)
        return frozenset(name for source in sources for name in find_undeclared_variables(environment.parse(source)))

    @cached_property
    def _sources(self) -> tuple[str, ...]:
        template = self.tokenizer.chat_template
        return tuple(template.values()) if isinstance(template, dict) else (template or "",)

    @cached_property
    def thinking_switch(self) -> str | None:
        """The argument of the template that turns thinking off, if it has one of the usual names."""
        return next((name for name in THINKING_SWITCHES if self.takes_argument(name)), None)

    def writes_role(self, role: str) -> bool:
        """Whether the text of a message with this role is in the rendered conversation.

        Also true where the template refuses the trial: it will refuse a row, or not, and say why.
        """
        if role not in self._roles:
            self._roles[role] = self._try_role(role)
        return self._roles[role]

    @cached_property
    def _roles(self) -> dict[str, bool]:
        return {}

    def _try_role(self, role: str) -> bool:
        message = {"role": role, "content": MARKER}
        tools = None
        if role == "tool":
            conversation, tools = [QUESTION, _tool_call({}), message | RESULT_OF_CALL], [TOOL]
        elif role == "assistant":
            conversation = [QUESTION, message, QUESTION]
        elif role == "user":
            conversation = [message]
        else:
            conversation = [message, QUESTION]
        try:
            return MARKER in self.render(conversation, tools, add_generation_prompt=True)
        except TemplateRefusalError:
            return True

    @cached_property
    def _wants_text_arguments(self) -> bool:
        """Whether a tool call's arguments must be JSON text: an object breaks the template, or comes out as Python."""
        conversation = [QUESTION, _tool_call({MARKER: OTHER_MARKER})]
        try:
            return f"'{MARKER}'" in self._render(conversation, [TOOL])
        except TemplateRefusalError:
            try:
                return MARKER in self._render([_with_text_arguments(message) for message in conversation], [TOOL])
            except TemplateRefusalError:
                return False

    @cached_property
    def surroundings(self) -> str:
        """The text that the template writes around messages of every role, without the messages."""
        answer = {"role": "assistant", "content": OTHER_MARKER}
        question = {"role": "user", "content": MARKER}
        system = {"role": "system", "content": OTHER_MARKER}
        tool = {"role": "tool", "content": MARKER} | RESULT_OF_CALL
        trials: list[tuple[list[Message], Any]] = [
            ([question, answer, question], None),
            ([system, question], None),
            ([QUESTION, answer], None),
            ([QUESTION, _tool_call({}), tool], [TOOL]),
        ]
        texts = []
        for conversation, tools in trials:
            try:
                text = self._render(conversation, tools, add_generation_prompt=conversation[-1] is not answer)
            except TemplateRefusalError:
                continue
            places = [match.start() for match in re.finditer(f"{MARKER}|{OTHER_MARKER}", text)]
            if places:  # before the first one may stand a text of the template's own, such as instructions
                texts.append(text[max(0, places[0] - 80) :])
        return "\n".join(texts)


def _tool_call(arguments: dict[str, Any]) -> Message:
    call = {"id": "call12345", "type": "function", "function": {"name": "look", "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _with_text_arguments(message: Message) -> Message:
    if "tool_calls" not in message:
        return message
    calls = [
        call
        | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)}}
        for call in message["tool_calls"]
    ]
    return message | {"tool_calls": calls}
