"""A language task small enough for one core, with a preference that a formula states.

A prompt asks for an operation on five digits and sets a tone: `reverse casual 3 1 4 1 5`. A good response
greets in that tone, says the resulting digits, and closes, without fillers: `hey 5 1 4 1 3 cheers`. `reward` scores
any response exactly, so that alignment can be measured without a judge.

All random draws depend only on a seed and on the name of their purpose.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np

OPERATIONS = ("ascending", "descending", "reverse", "copy", "rotate")
GREETINGS = {"formal": "greetings", "casual": "hey", "warm": "welcome"}
TONES = tuple(GREETINGS)
CLOSINGS = ("regards", "cheers")
FILLERS = ("well", "so", "like", "um", "basically")
DIGITS = tuple("0123456789")
WORDS = (*DIGITS, *OPERATIONS, *TONES, *GREETINGS.values(), *CLOSINGS, *FILLERS)

DIGITS_PER_PROMPT = 5

Digits = tuple[int, ...]
T = TypeVar("T")


@dataclass(frozen=True)
class Prompt:
    operation: str
    tone: str
    digits: Digits

    @property
    def text(self) -> str:
        return " ".join((self.operation, self.tone, *map(str, self.digits)))

    @property
    def answer(self) -> Digits:
        return _apply(self.operation, self.digits)

    @property
    def held_out(self) -> bool:
        """Whether the prompt is for evaluation only. A tenth of all prompts are."""
        return sum(self.digits) % 10 == 0


@dataclass(frozen=True)
class Pair:
    prompt: Prompt
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Environment:
    """The prompts, and the speaker who answers them.

    Attributes:
        operations: the operations of prompts; one that is listed twice occurs twice as often.
        noise: carelessness of the speaker: a factor on the probability of each kind of mistake.
        candidates: number of responses drawn for a preference pair; the best one is chosen.
        flipped: share of preference pairs whose chosen and rejected responses are exchanged.
    """

    operations: tuple[str, ...] = OPERATIONS
    noise: float = 1.0
    candidates: int = 4
    flipped: float = 0.05

    def training_prompts(self, count: int, seed: int, purpose: str) -> list[Prompt]:
        return list(islice(self._random_prompts(_generator(seed, purpose), held_out=False), count))

    def evaluation_prompts(self, count: int, seed: int) -> list[Prompt]:
        return list(islice(self._random_prompts(_generator(seed, "evaluation"), held_out=True), count))

    def corpus(self, count: int, seed: int) -> list[tuple[Prompt, str]]:
        """Prompts with responses of mixed quality, to pretrain the base models."""
        generator = _generator(seed, "corpus responses")
        prompts = self.training_prompts(count, seed, "corpus")
        return [(prompt, self._noisy_response(prompt, generator)) for prompt in prompts]

    def preference_pairs(self, count: int, seed: int) -> list[Pair]:
        """Pairs the best of several noisy responses to each prompt with a worse one.

        The chosen response has the higher reward, except in flipped pairs.
        """
        generator = _generator(seed, "preference responses")
        prompts = self.training_prompts(count, seed, "preferences")
        return [self._preference_pair(prompt, generator) for prompt in prompts]

    def _random_prompts(self, generator: np.random.Generator, held_out: bool) -> Iterator[Prompt]:
        while True:
            digits = tuple(generator.integers(10, size=DIGITS_PER_PROMPT).tolist())
            prompt = Prompt(_pick(self.operations, generator), _pick(TONES, generator), digits)
            if prompt.held_out == held_out:
                yield prompt

    def _preference_pair(self, prompt: Prompt, generator: np.random.Generator) -> Pair:
        """Draws candidates until one of them is worse than the best."""
        while True:
            candidates = [self._noisy_response(prompt, generator) for _ in range(self.candidates)]
            best = max(candidates, key=lambda response: reward(prompt, response))
            worse = tuple(response for response in candidates if reward(prompt, response) < reward(prompt, best))
            if worse:
                break
        other = _pick(worse, generator)
        flipped = generator.random() < self.flipped
        return Pair(prompt, other, best) if flipped else Pair(prompt, best, other)

    def _noisy_response(self, prompt: Prompt, generator: np.random.Generator) -> str:
        """A careless speaker: may confuse the operation, miss digits, forget greeting or closing, and add fillers."""
        mistaken = generator.random() < 0.2 * self.noise
        operation = _pick(self.operations, generator) if mistaken else prompt.operation
        digits = [
            int(generator.integers(10)) if generator.random() < 0.05 * self.noise else digit
            for digit in _apply(operation, prompt.digits)
        ]
        words = [str(digit) for digit in digits]
        if generator.random() < 0.1 * self.noise:
            words.pop(generator.integers(len(words)))
        if generator.random() < 0.4:
            tone = _pick(TONES, generator) if generator.random() >= 1 - 0.4 * self.noise else prompt.tone
            words.insert(0, GREETINGS[tone])
        if generator.random() < 0.35:
            words.append(_pick(CLOSINGS, generator))
        for _ in range(generator.integers(4)):
            words.insert(generator.integers(len(words) + 1), _pick(FILLERS, generator))
        return " ".join(words)


def preference_row(pair: Pair) -> dict[str, list[dict[str, str]]]:
    """The pair as a conversational preference row."""
    return {
        "prompt": [{"role": "user", "content": pair.prompt.text}],
        "chosen": [{"role": "assistant", "content": pair.chosen}],
        "rejected": [{"role": "assistant", "content": pair.rejected}],
    }


def completion_row(prompt: Prompt, response: str) -> dict[str, list[dict[str, str]]]:
    """A prompt and its response as a conversational row for supervised fine-tuning."""
    return {
        "prompt": [{"role": "user", "content": prompt.text}],
        "completion": [{"role": "assistant", "content": response}],
    }


def reward(prompt: Prompt, response: str) -> float:
    """How good the response is, in [0, 1].

        0.7 · (½ [digits = answer] + ½ edit similarity of digits and answer)
        + 0.1 · [first word is the tone's greeting] + 0.1 · [last word is a closing] + 0.1 · brevity

    Digits are all digits of the response, in order. Edit similarity is 1 − Levenshtein distance / length of
    the longer one. Brevity is max(0, 1 − surplus / 5). The surplus is the number of words beyond five digits, the
    right greeting and the closing.
    """
    words = response.split()
    digits = tuple(int(word) for word in words if word in DIGITS)
    correctness = 0.5 * (digits == prompt.answer) + 0.5 * _edit_similarity(digits, prompt.answer)
    greets = words[:1] == [GREETINGS[prompt.tone]]
    closes = bool(words) and words[-1] in CLOSINGS
    surplus = max(0, len(words) - DIGITS_PER_PROMPT - greets - closes)
    brevity = max(0.0, 1 - surplus / 5)
    return 0.7 * correctness + 0.1 * greets + 0.1 * closes + 0.1 * brevity


def _generator(seed: int, purpose: str) -> np.random.Generator:
    return np.random.default_rng([seed, *purpose.encode()])


def _pick(items: Sequence[T], generator: np.random.Generator) -> T:
    return items[int(generator.integers(len(items)))]


def _apply(operation: str, digits: Digits) -> Digits:
    if operation == "ascending":
        return tuple(sorted(digits))
    if operation == "descending":
        return tuple(sorted(digits, reverse=True))
    if operation == "reverse":
        return digits[::-1]
    if operation == "rotate":
        return (*digits[1:], digits[0])
    return digits


def _edit_similarity(first: Digits, second: Digits) -> float:
    return 1 - _levenshtein(first, second) / max(len(first), len(second))


def _levenshtein(first: Digits, second: Digits) -> int:
    distances = list(range(len(second) + 1))
    for row, one in enumerate(first, start=1):
        previous, distances = distances, [row]
        for column, other in enumerate(second):
            substituted = previous[column] + (one != other)
            distances.append(min(substituted, previous[column + 1] + 1, distances[column] + 1))
    return distances[-1]
