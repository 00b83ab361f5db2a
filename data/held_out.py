"""Holds out a share of the prompts, by their digests.

A prompt is held out in every run that holds out the same share, whatever else the data has: in the next run of a
student, with another seed, and when the data grows. A larger share holds out the same prompts, and more.
"""

import hashlib
from collections.abc import Iterable

DIGEST_BYTES = 8


def place(prompt: bytes) -> float:
    """The place of a prompt between 0 and 1, by the digest of its token ids; a share holds out the places below it."""
    digest = hashlib.blake2b(prompt, digest_size=DIGEST_BYTES, person=b"adpa held out").digest()
    return float(int.from_bytes(digest) / 256**DIGEST_BYTES)


def held_out(prompts: Iterable[bytes], share: float) -> list[bool]:
    """Whether each prompt is held out; examples of one prompt are held out together.

    Args:
        prompts: the token ids of each prompt, as bytes.
        share: the share to hold out, between 0 and 1.
    """
    return [place(prompt) < share for prompt in prompts]
