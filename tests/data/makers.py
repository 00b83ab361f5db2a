"""Small response sets, scorings and signal rows with random content."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from adpa.data.cache.responses import ResponseSet, ResponseSetInfo, Sampling
from adpa.data.cache.signal_rows import SignalRow
from adpa.data.cache.signals import ModelIdentity, Scoring

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


def teacher_row(key: bytes, length: int, seed: int, top_k: int = 50, vocabulary: int = 49152) -> SignalRow:
    """A row of a teacher and a reference: distinct ids, falling probabilities that leave a tail; float32."""
    random = np.random.default_rng(seed)
    logits = random.gumbel(size=(length, vocabulary)) * random.uniform(0.4, 2, (length, 1))
    logprobs = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
    logprobs -= logits.max(1, keepdims=True)
    ids = np.argsort(-logprobs, axis=1)[:, :top_k]
    kept = np.take_along_axis(logprobs, ids, 1)
    tail = np.log(np.maximum(1 - np.exp(kept).sum(1), 1e-12))
    advantages = random.normal(size=(length, top_k + 1)).astype(np.float32)
    return SignalRow(
        key=key,
        token_logprobs=kept[:, 0].astype(np.float32),
        topk_ids=ids.astype(np.int32),
        topk_logprobs=kept.astype(np.float32),
        tail_logprob=tail.astype(np.float32),
        token_advantages=advantages[:, top_k],
        topk_advantages=advantages[:, :top_k],
    )


def assert_same_row(read: SignalRow, expected: SignalRow) -> None:
    """Every array has the same numbers bit for bit, in the same types."""
    assert read.key == expected.key
    for field in fields(SignalRow):
        if field.name == "key":
            continue
        actual, original = getattr(read, field.name), getattr(expected, field.name)
        if original is None:
            assert actual is None
        else:
            assert (actual.dtype, actual.shape) == (original.dtype, original.shape)
            assert actual.tobytes() == original.tobytes()
