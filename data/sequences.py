"""Token sequences: a prompt and a response, and the key under which a cache stores their signals."""

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

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


def sequence_key(prompt_ids: TokenIds, response_ids: TokenIds) -> bytes:
    """The key of a sequence's signals: a 16-byte digest of its ids and of the place where the response starts."""
    digest = hashlib.blake2b(len(prompt_ids).to_bytes(8, "little"), digest_size=16)
    digest.update(prompt_ids.astype("<i4").tobytes())
    digest.update(response_ids.astype("<i4").tobytes())
    return digest.digest()
