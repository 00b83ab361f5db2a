"""What a user can do where a chat template and a row do not fit; each advice was tried on the template."""

import json
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any

from adpa.data.chat_template import THINKING_FIELDS, ChatTemplate
from adpa.data.messages import Message
from adpa.data.template_trials import ANSWER, MARKER, OTHER_MARKER, QUESTION, TemplateRefusalError

SWITCH_VALUES = (False, True, "none", "high", 0)  # of the arguments that switch thinking off or on
# What every template has.
COMMON_VARIABLES = {
    "messages",
    "tools",
    "add_generation_prompt",
    "bos_token",
    "eos_token",
    "strftime_now",
    "raise_exception",
}
THOUGHT_AND_ANSWER = f"<think>\n{OTHER_MARKER}\n</think>\n\n{MARKER}"
EDIT_SPACE = "edit the white space around the end of the prompt in the template"
EDIT = "edit the template, or pass --rendered with prompts that are rendered already"


def advice_on_prefix(template: ChatTemplate, response: Message, given: Mapping[str, Any]) -> str | None:
    """How to make the prompt a prefix of prompt and response.

    None if the template is fine for a simple response of this kind: then the cause is in this row.

    Args:
        template: the chat template.
        response: the response; whether it has thinking counts, and where.
        given: the arguments that the row gives.
    """
    answer = ANSWER | {name: OTHER_MARKER for name in THINKING_FIELDS if name in response}
    if "</think>" in response["content"]:
        answer |= {"content": THOUGHT_AND_ANSWER}
    if _fits(template, answer, given):
        return None
    prompt, whole = _render(template, answer, given)
    edit = EDIT_SPACE if whole.startswith(prompt) else EDIT
    return ", or ".join((*_ways_to_fit(template, answer, given), edit))


def _ways_to_fit(template: ChatTemplate, answer: Message, given: Mapping[str, Any]) -> Iterator[str]:
    free = template.variables - given.keys()  # a row's arguments go first
    if switch := find_argument(template, free, lambda found: _fits(template, answer, {**given, **found})):
        yield pass_arguments(switch)
    if answer != ANSWER:
        return
    for name in THINKING_FIELDS:
        if _fits(template, ANSWER | {name: OTHER_MARKER}, given):
            yield f"give responses with their thinking (`{name}`)"
            return
    if _fits(template, ANSWER | {"content": THOUGHT_AND_ANSWER}, given):
        yield "give responses with their thinking (<think>…</think> in the content)"


def advice_on_thinking(template: ChatTemplate, name: str) -> str:
    """How to get a response's thinking into the text, if the template leaves out the field ``name``."""
    fields = [field for field in THINKING_FIELDS if writes_thinking(template, field, {})]
    if fields and name not in fields:
        return f"the template reads `{fields[0]}`: rename it"
    if not fields and (
        switch := find_argument(template, template.variables, lambda found: writes_thinking(template, name, found))
    ):
        return pass_arguments(switch)
    return "put the thinking into the content, or use another template"


def find_argument(
    template: ChatTemplate, variables: Set[str], works: Callable[[Mapping[str, Any]], bool]
) -> dict[str, Any]:
    """The first argument for which ``works`` is true, among ``variables``; empty if there is none."""
    names = sorted(variables - COMMON_VARIABLES - {*template.tokenizer.special_tokens_map})
    names.sort(key=lambda name: "think" not in name)
    return next(({name: value} for name in names for value in SWITCH_VALUES if works({name: value})), {})


def pass_arguments(arguments: Mapping[str, Any]) -> str:
    """The option with arguments of the template, as a user writes it."""
    return f"pass --chat-template-kwargs '{json.dumps(arguments)}'"


def _fits(template: ChatTemplate, answer: Message, arguments: Mapping[str, Any]) -> bool:
    """Whether the tokens of a prompt are the beginning of those of prompt and answer, and nothing is left out."""
    prompt, whole = _render(template, answer, arguments)
    marks = [mark for mark in (MARKER, OTHER_MARKER) if mark in "".join(answer.values())]
    if not whole.startswith(prompt) or any(mark not in whole for mark in marks):
        return False
    prompt_ids, whole_ids = template.tokenizer([prompt, whole], add_special_tokens=False)["input_ids"]
    return list(whole_ids[: len(prompt_ids)]) == list(prompt_ids)


def writes_thinking(template: ChatTemplate, name: str, arguments: Mapping[str, Any]) -> bool:
    """Whether the template writes a field of thinking in the last turn."""
    return OTHER_MARKER in _render(template, ANSWER | {name: OTHER_MARKER}, arguments)[1]


def _render(template: ChatTemplate, answer: Message, arguments: Mapping[str, Any]) -> tuple[str, str]:
    """The prompt, and prompt and answer; two different texts where the template refuses them."""
    try:
        prompt = template.render([QUESTION], arguments=arguments, add_generation_prompt=True)
        return prompt, template.render([QUESTION, answer], arguments=arguments)
    except TemplateRefusalError:
        return "-", ""
