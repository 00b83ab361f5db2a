"""Small response sets, scorings and signal rows with random content."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from adpa.data.responses import ResponseSet, ResponseSetInfo, Sampling
from adpa.data.signals import ModelIdentity, Scoring, SignalRow

TURN_END = 2
K = 3

INFO = ResponseSetInfo(
    name="chosen",
    tokenizer="tokenizer-digest",
    vocabulary="vocabulary-digest",
    chat_template="template-digest",
    turn_end=TURN_END,
    max_prompt_length=16,
    max_length=32,
    truncated_prompts=0,
    dropped=0,
)
SAMPLING = Sampling(
    student="student-digest",
    turn_end=TURN_END,
    temperature=0.7,
    top_p=0.95,
    max_new_tokens=16,
    samples_per_prompt=1,
    seed=0,
    dtype="float32",
    engine="hf",
)
SCORING = Scoring(
    teacher=ModelIdentity("org/teacher", "main", "teacher-digest"),
    reference=ModelIdentity("org/reference", None, "reference-digest"),
    vocabulary="vocabulary-digest",
    top_k=K,
    dtype="bfloat16",
    engine="vllm",
)

ResponseRow = tuple[str, np.ndarray[Any, np.dtype[np.int32]], np.ndarray[Any, np.dtype[np.int32]]]


def token_ids(*ids: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.array(ids, dtype=np.int32)


def response_rows(seed: int, example_ids: Sequence[str]) -> list[ResponseRow]:
    """Random prompts and responses, which end with the end-of-turn token."""
    random = np.random.default_rng(seed)
    return [
        (
            example_id,
            random.integers(10, 1000, random.integers(1, 7), dtype=np.int32),
            np.append(random.integers(10, 1000, random.integers(0, 7), dtype=np.int32), np.int32(TURN_END)),
        )
        for example_id in example_ids
    ]


def signal_row(key: bytes, length: int, seed: int, top_k: int = K, reference: bool = True) -> SignalRow:
    """A row of random numbers in the types of the cache."""
    random = np.random.default_rng(seed)

    def per_id() -> np.ndarray[Any, np.dtype[np.float16]]:
        return random.normal(size=(length, top_k)).astype(np.float16)

    def per_token() -> np.ndarray[Any, np.dtype[np.float32]]:
        return random.normal(size=length).astype(np.float32)

    return SignalRow(
        key=key,
        token_logprobs=per_token(),
        topk_ids=random.integers(0, 1000, (length, top_k), dtype=np.int32),
        topk_logprobs=per_id(),
        tail_logprob=per_token(),
        token_advantages=per_token() if reference else None,
        topk_advantages=per_id() if reference else None,
    )


def signal_rows(responses: ResponseSet, seed: int, reference: bool = True) -> list[SignalRow]:
    """A row for every sequence of a set."""
    return [
        signal_row(sequence.key, len(sequence.response_ids), seed + number, reference=reference)
        for number, sequence in enumerate(responses.sequences())
    ]
