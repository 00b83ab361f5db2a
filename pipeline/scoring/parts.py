"""``--part i/n``: divides the data between machines that share one command without talking to one another."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from adpa.data.sequences import TokenIds, sequence_key
from adpa.errors import OptionError

NO_IDS = np.array([], dtype=np.int32)


@dataclass(frozen=True)
class Part:
    """Part ``number`` of ``count``, counted from 1."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


WHOLE = Part(1, 1)


def parse_part(text: str | None) -> Part:
    """Parses ``i/n``; None means the whole data.

    Raises:
        OptionError: the text is not ``i/n``, or i is not between 1 and n.
    """
    if text is None:
        return WHOLE
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text, re.ASCII)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise OptionError(f"--part {text or repr(text)}; expected i/n with i from 1 to n, such as 1/4")
    return Part(int(match[1]), int(match[2]))


class PartPrompts:
    """The prompts of a part. It takes every n-th distinct prompt, in the order of their digests.

    So one part alone samples and scores the responses to a prompt, and all parts get equally many prompts.

    Raises:
        OptionError: the data has fewer distinct prompts than parts.
    """

    def __init__(self, part: Part, prompts: Iterable[TokenIds]) -> None:
        digests = sorted({_digest(prompt_ids) for prompt_ids in prompts})
        self.distinct = len(digests)  # in all parts
        if len(digests) < part.count:
            raise OptionError(
                f"--part {part}: the data has only {len(digests)} different prompts", "divide it into fewer parts"
            )
        self._digests = frozenset(digests[part.number - 1 :: part.count])

    def __contains__(self, prompt_ids: TokenIds) -> bool:
        return _digest(prompt_ids) in self._digests


def _digest(prompt_ids: TokenIds) -> bytes:
    return sequence_key(prompt_ids, NO_IDS)
