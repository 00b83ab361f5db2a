"""The answers of two models to the first prompts of the data, as text."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from adpa.data.answers import Answers
from adpa.data.json_rows import Rows
from adpa.data.messages import Message
from adpa.data.preferences import parse_pair
from adpa.data.sequences import TokenIds
from adpa.errors import RowError


@dataclass(frozen=True)
class ShownPrompt:
    """A prompt and the answers to it, the first sampled one of each model.

    Attributes:
        prompt: the last message of the user; the whole text of a prompt that is rendered already.
        student: the student's answer.
        baseline: the baseline's answer.
        student_reward: the implicit reward of the student's answer, in nats.
        baseline_reward: the same of the baseline's.
        messages: how many messages the prompt has; 1 for a rendered one.
    """

    prompt: str
    student: str
    baseline: str
    student_reward: float
    baseline_reward: float
    messages: int = 1


def first_prompts(prompts: Sequence[tuple[str, TokenIds]], count: int) -> dict[bytes, str]:
    """The first distinct prompts of (example id, prompt ids): the bytes of their ids, with their example ids."""
    first: dict[bytes, str] = {}
    for example_id, prompt_ids in prompts:
        if len(first) < count:
            first.setdefault(prompt_ids.tobytes(), example_id)
    return first


def read_questions(rows: Rows, rendered: bool, wanted: Collection[str]) -> dict[str, tuple[str, int]]:
    """What the user asked last in some examples, and the number of their prompt's messages, by their ids.

    Reads no further than to the last of them.
    """
    found: dict[str, tuple[str, int]] = {}
    if not wanted:
        return found
    for where, row in rows:
        with suppress(RowError):
            pair = parse_pair(where, row, rendered, prompts_alone=True)
            if pair.example_id in wanted:
                found.setdefault(pair.example_id, _question(pair.prompt))
        if len(found) == len(wanted):
            break
    return found


def _question(prompt: Sequence[Message] | str) -> tuple[str, int]:
    if isinstance(prompt, str):
        return prompt, 1
    asked = [message["content"] for message in prompt if message["role"] == "user"]
    return str(asked[-1] if asked else prompt[-1]["content"]), len(prompt)


def show_answers(
    prompts: Mapping[bytes, str],
    questions: Mapping[str, tuple[str, int]],
    student: Answers,
    baseline: Answers,
    decode: Callable[[TokenIds], str],
) -> list[ShownPrompt]:
    """The answers to some prompts.

    Args:
        prompts: the result of ``first_prompts``.
        questions: the result of ``read_questions`` for their examples.
        student: the answers of the student.
        baseline: the answers of the baseline.
        decode: gives the text of an answer.
    """
    return [
        ShownPrompt(
            prompt=questions[example_id][0],
            student=decode(student.first[prompt]),
            baseline=decode(baseline.first[prompt]),
            student_reward=student.first_reward(prompt),
            baseline_reward=baseline.first_reward(prompt),
            messages=questions[example_id][1],
        )
        for prompt, example_id in prompts.items()
    ]
