"""The end of an assistant's turn, as a chat template writes it after an answer and after a tool call."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
from adpa.errors import ModelError

if TYPE_CHECKING:
    from adpa.data.chat_template import ChatTemplate


@dataclass(frozen=True)
class TurnEnd:
    """How a chat template ends an assistant's turn.

    Attributes:
        token_id: id of the end-of-turn token, the last token of a response.
        trailing: number of further tokens that the template writes.
        text: the text between the assistant's words and the trailing tokens; most often the end-of-turn token.
        texts: ``text``, and each special token in it: what may end a response that has its end of turn already.
        unwritten: the end of ``text`` that the template writes only before a next message; adpa appends it.
    """

    token_id: int
    trailing: int
    text: str
    texts: tuple[str, ...]
    unwritten: str = ""


def find_turn_end(template: "ChatTemplate") -> TurnEnd:
    """The end of an answer.

    A response runs to the token that ends generation. Two special tokens may end a turn: the first of them that is an
    end of generation counts, or else the first.

    Raises:
        ModelError: the tokenizer has no chat template, or it cannot render an answer, or it ends the turn without a
            special token.
    """
    name = template.tokenizer.name_or_path
    if not template.tokenizer.chat_template:
        raise ModelError(
            f"{name}: the tokenizer has no chat template",
            "set tokenizer.chat_template and save it beside the teacher",
        )
    suffix, problem = "", ""
    for tools in (None, [TOOL]):  # some templates want tools
        try:
            _, seen, suffix = template.render([QUESTION, ANSWER], tools).rpartition(MARKER)
        except TemplateRefusalError as error:
            problem = problem or f"refuses a question and its answer: {error}"
            continue
        if seen:
            break
        problem = problem or "changes the assistant's text"
    else:
        raise ModelError(f"{name}: the chat template {problem}", "mend the teacher's chat template")
    ids, special = _special_places(template, suffix)
    run = [place for index, place in enumerate(special) if place == special[0] + index]
    stops = template.stops
    ending = [place for place in run if ids[place] in stops]
    if not ending and template.eos_token_ids:
        ending = [place for place in special if ids[place] in stops]
    if ending or special:
        return _turn_end(template, suffix, ids, (ending or special)[0])
    end = _end_in_history(template, suffix, [ANSWER, MARKED_QUESTION])
    if end is None and problem:
        raise ModelError(f"{name}: the chat template {problem}", "mend the teacher's chat template")
    if end is None:
        raise ModelError(
            f"{name}: the chat template ends the assistant's turn with no special token",
            "end it with eos_token in the template",
        )
    return end


def find_call_end(template: "ChatTemplate") -> TurnEnd:
    """The end of a tool call: the one of an answer, unless the template ends calls by another end of generation."""
    answer_end = template.turn_end
    try:
        _, seen, suffix = template.render([QUESTION, CALL], [TOOL]).rpartition(MARKER)
    except TemplateRefusalError:
        return answer_end
    ids, special = _special_places(template, suffix)
    stops = template.stops | {answer_end.token_id}
    ending = [place for place in special if ids[place] in stops]
    if seen and ending:
        return _turn_end(template, suffix, ids, ending[0])
    return _end_in_history(template, suffix, [CALL, RESULT]) or answer_end


def _end_in_history(template: "ChatTemplate", suffix: str, turns: list[Message]) -> TurnEnd | None:
    """The end that the template writes before the next message, and not after the last one."""
    try:
        text = template.render([QUESTION, *turns], [TOOL] if turns[0] is CALL else None)
    except TemplateRefusalError:
        return None
    between = text.partition(MARKER)[2].rpartition(OTHER_MARKER)[0]
    ids, special = _special_places(template, between)
    ending = [place for place in special if ids[place] in template.stops]
    if not ending or not between.startswith(suffix):
        return None
    end = _turn_end(template, between, ids, ending[0])
    return TurnEnd(end.token_id, 0, end.text, end.texts, end.text.removeprefix(suffix))


def _special_places(template: "ChatTemplate", text: str) -> tuple[list[int], list[int]]:
    """The ids of a text, and the places of the special tokens in it."""
    ids = list(template.tokenizer(text, add_special_tokens=False)["input_ids"])
    return ids, [place for place, token_id in enumerate(ids) if token_id in template.special_ids]


def _turn_end(template: "ChatTemplate", suffix: str, ids: Sequence[int], place: int) -> TurnEnd:
    tokens = [
        str(template.tokenizer.convert_ids_to_tokens(index))
        for index in ids[: place + 1]
        if index in template.special_ids
    ]
    after = 0
    for token in tokens:
        after = suffix.index(token, after) + len(token)
    text = suffix[:after]
    return TurnEnd(ids[place], len(ids) - place - 1, text, tuple(dict.fromkeys([text, *tokens])))
