"""Parts of the data, for machines that share the work of one command without talking to one another."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from adpa.data.sequences import TokenIds, sequence_key
from adpa.errors import OptionError

NO_IDS = np.array([], dtype=np.int32)


@dataclass(frozen=True)
class Part:
    """One part of several, ``number`` of 1 to ``count``."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


WHOLE = Part(1, 1)


def parse_part(text: str | None) -> Part:
    """The part that ``i/n`` names; default: all of it.

    Raises:
        OptionError: it is no such text, or i is not one of 1 to n.
    """
    if text is None:
        return WHOLE
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise OptionError(f"--part {text}; expected i/n with i from 1 to n, such as 1/4")
    return Part(int(found[1]), int(found[2]))


class PartPrompts:
    """The prompts of a part: the different ones of the data are dealt out in the order of their digests.

    What is sampled for a prompt and scored with it is then asked of one part alone, and every part has its share.

    Raises:
        OptionError: there are fewer prompts than parts.
    """

    def __init__(self, part: Part, prompts: Iterable[TokenIds]) -> None:
        digests = sorted({_digest(prompt_ids) for prompt_ids in prompts})
        if len(digests) < part.count:
            raise OptionError(
                f"--part {part}: the data has only {len(digests)} different prompts", "divide it into fewer parts"
            )
        self._digests = frozenset(digests[part.number - 1 :: part.count])

    def __contains__(self, prompt_ids: TokenIds) -> bool:
        return _digest(prompt_ids) in self._digests


def _digest(prompt_ids: TokenIds) -> bytes:
    return sequence_key(prompt_ids, NO_IDS)
