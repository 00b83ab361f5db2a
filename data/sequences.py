"""Token sequences: a prompt and a response, and the key under which a cache stores their signals."""

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from adpa.errors import OptionError

TokenIds = NDArray[np.int32]

# How a batch places its sequences: padded side by side, end to end, or end to end with equal prompts once.
Packing = Literal["none", "sequences", "prompts"]


@dataclass(frozen=True)
class TokenSequence:
    """A prompt and one response to it, as token ids.

    Attributes:
        key: ``sequence_key`` of the two, 16 bytes.
        prompt_ids: int32 [P].
        response_ids: int32 [T], with the end-of-turn token unless it was cut off.
    """

    key: bytes
    prompt_ids: TokenIds
    response_ids: TokenIds

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


def check_lengths(max_prompt_length: int, max_length: int) -> None:
    """Checks the limits of a prompt and of prompt and response together, in tokens.

    Raises:
        OptionError: they leave no room for a prompt or for a response.
    """
    if not 0 < max_prompt_length < max_length:
        raise OptionError(
            f"--max-prompt-length {max_prompt_length} with --max-length {max_length}; "
            "expected 0 < max-prompt-length < max-length",
            "leave room for the response",
        )


def sequence_key(prompt_ids: TokenIds, response_ids: TokenIds) -> bytes:
    """The key of a sequence's signals: a 16-byte digest of its ids and of the place where the response starts."""
    digest = hashlib.blake2b(len(prompt_ids).to_bytes(8, "little"), digest_size=16)
    digest.update(prompt_ids.astype("<i4").tobytes())
    digest.update(response_ids.astype("<i4").tobytes())
    return digest.digest()
