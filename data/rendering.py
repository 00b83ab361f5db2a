"""Renders preference pairs as text, and checks that the chat template leaves nothing out.

Texts are compared without white space: templates may trim what they write.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from adpa.data.chat_template import OPEN_THINKING, THINKING_FIELDS, ChatTemplate
from adpa.data.control_tokens import ControlTokens, leaves
from adpa.data.messages import DROP, Message
from adpa.data.preferences import PreferencePair
from adpa.data.template_advice import advice_on_prefix, advice_on_thinking, writes_thinking
from adpa.data.template_trials import TemplateRefusalError
from adpa.data.turn_end import TurnEnd
from adpa.errors import RowError

# Everything up to the end of an assistant's thinking, as templates cut it out of earlier turns.
_TAG = r"[^<>\s]*(?:think|thought|reasoning)[^<>\s]*>"
_OPENING = rf"(?:<(?!/|\|/|\|?end){_TAG}|\[(?:\w+_)?THINK(?:ING)?\])"
_CLOSING = rf"(?:<(?:/|\|(?:/|end)){_TAG}|\[/THINK(?:ING)?\])"
THINKING = re.compile(rf"^\s*{_OPENING}.*?{_CLOSING}", re.DOTALL | re.IGNORECASE)
# Where the prompt opens the thinking, an answer has the closing tag alone.
OPENED_THINKING = re.compile(rf"^(?:\s*{_OPENING}.*?|(?:(?!{_OPENING}).)*?){_CLOSING}", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class Rendered:
    """A preference pair, or a prompt alone, as text.

    Attributes:
        prompt: the conversation up to the response.
        wholes: the whole conversations with the responses, by the responses' columns; none for a prompt alone.
        ends: the ends of the turn in them.
        thinking_left_out: whether the template leaves out thinking of earlier turns.
    """

    prompt: str
    wholes: dict[str, str]
    ends: dict[str, TurnEnd]
    thinking_left_out: bool = False


@dataclass(frozen=True)
class Renderer:
    """Renders pairs by a chat template; ``allow_control_tokens`` takes texts with control tokens."""

    template: ChatTemplate
    allow_control_tokens: bool = False

    def render(self, pair: PreferencePair) -> Rendered:
        """The pair as text.

        Raises:
            RowError: the template refuses the conversation, or leaves a part of it out; or a text has control tokens.
        """
        responses = {column: self._without_end(pair, column, one) for column, one in pair.responses.items()}
        messages = [] if isinstance(pair.prompt, str) else [self._strip_end(message) for message in pair.prompt]
        self._check_control_tokens(pair, messages, responses)
        if isinstance(pair.prompt, str):
            end = replace(self.template.turn_end, trailing=0)
            wholes = {column: pair.prompt + response["content"] + end.text for column, response in responses.items()}
            return Rendered(pair.prompt, wholes, dict.fromkeys(wholes, end))
        self._check_template(pair, messages)
        prompt, wholes = self._conversations(pair, messages, responses)
        thinking_left_out = self._check_prompt(pair, messages, prompt)
        for column, response in responses.items():
            if not wholes[column].startswith(prompt):
                cause = "the chat template changes the prompt when the response follows"
                raise self.no_prefix(pair, column, response, prompt, cause)
            opened = OPEN_THINKING.search(prompt)  # a response with its thinking begins in the prompt then
            self._check_response(pair, column, response, wholes[column][opened.start() if opened else len(prompt) :])
        ends = {column: self._end(response) for column, response in responses.items()}
        return Rendered(prompt, wholes, ends, thinking_left_out)

    def _end(self, response: Message) -> TurnEnd:
        return self.template.call_end if "tool_calls" in response else self.template.turn_end

    def no_prefix(self, pair: PreferencePair, column: str, response: Message, prompt: str, cause: str) -> RowError:
        """The error of a prompt that is not the beginning of prompt and response."""
        opened = OPEN_THINKING.search(prompt)
        if opened and not isinstance(pair.prompt, str):
            cause = f"the prompt ends with {opened[1]}, where the model begins to think"
        if isinstance(pair.prompt, str):
            advice: str | None = "strip the end of the prompt or the beginning of the response, or pass --drop-invalid"
        else:
            advice = self._advice_on_prefix(response, pair.chat_template_kwargs)
        return RowError(
            f"{pair.where}: the prompt's tokens are not a prefix of the tokens of prompt and `{column}`: {cause}",
            advice or "use a template that only appends, strip the response, or pass --drop-invalid",
            "prompt changes with the response",
        )

    def _advice_on_prefix(self, response: Message, given: Mapping[str, Any]) -> str | None:
        shape = (*(name in response for name in THINKING_FIELDS), "</think>" in response["content"], json.dumps(given))
        if shape not in self._advice:
            self._advice[shape] = advice_on_prefix(self.template, response, given)
        return self._advice[shape]

    @cached_property
    def _advice(self) -> dict[tuple[object, ...], str | None]:
        return {}

    def _without_end(self, pair: PreferencePair, column: str, response: Message) -> Message:
        """The response without an end of turn in its text."""
        stripped = self._strip_end(response)
        if not stripped["content"].strip() and "tool_calls" not in stripped:
            raise RowError(f"{pair.where}: `{column}` is an empty response", DROP, "empty response")
        return stripped

    def _strip_end(self, message: Message) -> Message:
        """An assistant's message without an end of turn in its text: the template writes it."""
        if message["role"] != "assistant":
            return message
        text = message["content"]
        while end := next(filter(text.rstrip().endswith, self.template.turn_end.texts), None):
            text = text.rstrip().removesuffix(end)
        return message if text is message["content"] else message | {"content": text}

    @cached_property
    def _control_tokens(self) -> ControlTokens:
        return ControlTokens(self.template)

    def _check_control_tokens(
        self, pair: PreferencePair, prompt: Sequence[Message], responses: Mapping[str, Message]
    ) -> None:
        if self.allow_control_tokens:
            return
        places = [(f"the {message['role']} message of the prompt", message) for message in prompt]
        places += [(f"`{column}`", response) for column, response in responses.items()]
        for place, message in places:
            if (token := self._control_tokens.find(message)) is not None:
                raise self._has_control_token(pair, place, token)
        for column, value in (("tools", pair.tools), ("chat_template_kwargs", pair.chat_template_kwargs)):
            if value and (token := self._control_tokens.find_in_json(value)) is not None:
                raise self._has_control_token(pair, f"`{column}`", token)

    @staticmethod
    def _has_control_token(pair: PreferencePair, place: str, token: str) -> RowError:
        rendered = "pass --rendered if prompts are rendered already, " if place.endswith("of the prompt") else ""
        return RowError(
            f"{pair.where}: {place} has the control token {token!r} in its text",
            f"remove it, {rendered}or pass --allow-control-tokens to take it as it is",
            "control tokens",
        )

    def _check_template(self, pair: PreferencePair, prompt: Sequence[Message]) -> None:
        """Checks that the template knows the messages, the tools and the arguments of a row."""
        template = self.template
        if pair.tools and not template.takes_argument("tools"):
            raise RowError(
                f"{pair.where}: the row has tools, and the chat template takes none",
                "use a template with tools, or pass --drop-invalid",
                "tools unknown to the template",
            )
        for name in pair.chat_template_kwargs:
            if not template.takes_argument(name):
                raise RowError(
                    f"{pair.where}: `chat_template_kwargs` has {name!r}, which the chat template does not take",
                    "check the name, or pass --drop-invalid",
                    "argument unknown to the template",
                )
        calls = [each for each in pair.responses.values() if "tool_calls" in each]
        for messages in (prompt, *([*prompt, each] for each in calls)):
            if left_out := template.left_out(messages, pair.tools, pair.chat_template_kwargs):
                roles = ", ".join(message["role"] for message in messages)
                raise RowError(
                    f"{pair.where}: the chat template leaves out {left_out} in a conversation of {roles}",
                    "use other roles or another template, or pass --drop-invalid",
                    "messages left out by the template",
                )

    def _conversations(
        self, pair: PreferencePair, prompt: Sequence[Message], responses: Mapping[str, Message]
    ) -> tuple[str, dict[str, str]]:
        """The conversation up to the response, and with each response."""

        def render(*response: Message) -> str:
            messages = [*prompt, *response]
            text = self.template.render(messages, pair.tools, pair.chat_template_kwargs, not response)
            return text + self._end(response[0]).unwritten if response else text

        try:
            return render(), {column: render(response) for column, response in responses.items()}
        except TemplateRefusalError as error:
            raise RowError(
                f"{pair.where}: the teacher's chat template refuses the conversation: {error}",
                DROP,
                "refused by the template",
            ) from error

    def _check_prompt(self, pair: PreferencePair, messages: Sequence[Message], prompt: str) -> bool:
        """Checks that every message is in the rendered prompt; returns whether earlier thinking is left out."""
        rendered, left_out = _squeeze(prompt), False
        for message in messages:
            missing = _missing(message, rendered)
            if missing and message["role"] == "assistant":
                thinking = OPENED_THINKING if OPEN_THINKING.search(prompt) else THINKING
                later = message | {"content": thinking.sub("", message["content"])}
                fields = [name for name in THINKING_FIELDS if name in message and self._reads(name, pair)]
                missing = _missing({name: value for name, value in later.items() if name not in fields}, rendered)
                left_out = True
            if missing:
                raise self._leaves_out(pair, f"the {message['role']} message of the prompt", *missing)
        for name, text in _descriptions(pair.tools or ()):
            if _lacks(rendered, text):
                raise self._leaves_out(pair, "`tools`", name, text)
        return left_out

    def _reads(self, name: str, pair: PreferencePair) -> bool:
        """Whether the template writes a field of thinking in the last turn."""
        key = name, json.dumps(pair.chat_template_kwargs)
        if key not in self._read_fields:
            self._read_fields[key] = writes_thinking(self.template, name, pair.chat_template_kwargs)
        return self._read_fields[key]

    @cached_property
    def _read_fields(self) -> dict[tuple[str, str], bool]:
        return {}

    def _check_response(self, pair: PreferencePair, column: str, response: Message, text: str) -> None:
        missing = _missing(response, _squeeze(text))
        if missing:
            raise self._leaves_out(pair, f"`{column}`", *missing)
        end = self._end(response).texts[-1]
        if text.count(end) > 1 + sum(part.count(end) for _, part in _parts(response)):
            raise RowError(
                f"{pair.where}: the chat template writes {end!r}, the end of the turn, more than once in `{column}`",
                "use another template, or pass --drop-invalid",
                "several ends of a turn",
            )

    def _leaves_out(self, pair: PreferencePair, place: str, name: str, text: str) -> RowError:
        part = "" if name == "content" else f" `{name}`,"
        fix = "use another template, change the text, or pass --drop-invalid"
        if name in THINKING_FIELDS:
            fix = advice_on_thinking(self.template, name)
        return RowError(
            f"{pair.where}: the chat template leaves out text of {place}:{part} {text!r:.60}",
            fix,
            "text left out by the template",
        )


def _missing(message: Mapping[str, Any], squeezed: str) -> tuple[str, str] | None:
    """The name and the text of the first part of a message that a rendered text lacks."""
    return next((part for part in _parts(message) if _lacks(squeezed, part[1])), None)


def _lacks(squeezed: str, text: str) -> bool:
    """Whether a rendered text lacks a text, both as it is and as JSON writes it."""
    return _squeeze(text) not in squeezed and _squeeze(json.dumps(text, ensure_ascii=False)[1:-1]) not in squeezed


def _parts(message: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and texts of a message's parts. A tool's name is in its call already."""
    if message["role"] != "tool" and "name" in message:
        yield "name", message["name"]
    yield from ((name, message[name]) for name in ("content", *THINKING_FIELDS) if name in message)
    for call in message.get("tool_calls", ()):
        function = call["function"]
        yield "tool_calls", function["name"]
        yield from (("tool_calls", text) for text in leaves(function["arguments"]))


def _descriptions(value: object) -> Iterator[tuple[str, str]]:
    """What a model must know of tools: every name and description in their JSON schemas, and the parameters' names."""
    if isinstance(value, list | tuple):
        for inner in value:
            yield from _descriptions(inner)
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            if name in ("name", "description") and isinstance(inner, str):
                yield name, inner
            elif name == "properties" and isinstance(inner, Mapping):
                yield from (("properties", parameter) for parameter in inner)
                yield from _descriptions(list(inner.values()))
            else:
                yield from _descriptions(inner)


def _squeeze(text: str) -> str:
    return "".join(text.split())
