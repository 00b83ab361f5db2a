"""Checks the rows of a cache, and says what is wrong with a row.

The tolerances follow from the number formats alone:

    float32    A log-probability is a float32 difference of a logit and a log-sum-exp. For logits of up to 1,024 the
               steps of float32 are 2^-13, and each of the two is off by half a step: ``FLOAT32_ERROR`` is 2^-13.
    float16    It has 11 binary digits. Storing log p adds half a unit of the last digit: at most |log p| · 2^-11.
    lossy      Rounding adds half a step of the grid of ``rounding.py``: min(LOGPROB_STEP / p, COARSEST) / 2.
               The tail and the response's own tokens are in float16.

An error e of log p changes the mass by p · (exp(e) − 1). So the mass of a position may be off by the sum of these
errors and ``FLOAT32_ERROR``.

Shapes: T response tokens, K ids of the teacher's top K.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from adpa.data.cache.compact import ERRORS
from adpa.data.cache.ragged import list_row
from adpa.data.cache.responses import ResponseSet, make_response_set
from adpa.data.cache.rounding import COARSEST, GRID, LOGPROB_STEP
from adpa.data.cache.signal_rows import PADDING, SignalRow
from adpa.data.cache.signals import TOP_K_LIMIT
from adpa.data.sequences import sequence_key

FLOAT16_ERROR = 2.0**-11
FLOAT32_ERROR = 2.0**-13
FLOAT16_LOWEST = float(np.finfo(np.float16).min)  # less becomes −inf


@dataclass(frozen=True)
class SignalRules:
    """The rules that the rows of a scoring must obey.

    Attributes:
        top_k: K.
        with_reference: whether rows have advantages.
        top_p: if below 1, a position may have fewer than K ids, when their mass is at least this; padding follows them.
        lossy: whether log-probabilities were rounded as ``rounding.py`` says.
    """

    top_k: int
    with_reference: bool
    top_p: float = 1.0
    lossy: bool = False


def signal_problems(row: SignalRow, rules: SignalRules, response_ids: NDArray[np.int32] | None) -> Iterator[str]:
    """Yields the problems of a signal row, each as its kind, a colon and the details.

    Args:
        row: the row.
        rules: the rules that it must obey.
        response_ids: int32 [T], the response that it belongs to; none if no response set has that.
    """
    length, with_reference = len(row.token_logprobs), rules.with_reference
    advantages = (row.token_advantages, row.topk_advantages)
    if any((column is not None) != with_reference for column in advantages):
        yield "advantages are missing" if with_reference else "advantages without a reference"
        return
    shapes: list[tuple[NDArray[Any], tuple[int, ...]]] = [
        (row.token_logprobs, (length,)),
        (row.tail_logprob, (length,)),
    ]
    shapes += [(column, (length, rules.top_k)) for column in (row.topk_ids, row.topk_logprobs)]
    if row.token_advantages is not None and row.topk_advantages is not None:
        shapes += [(row.token_advantages, (length,)), (row.topk_advantages, (length, rules.top_k))]
    if any(column.shape != shape for column, shape in shapes):
        shown = ", ".join(str(column.shape) for column, _ in shapes)
        yield f"its columns do not have one length, or not K = {rules.top_k} ids: {shown}"
        return
    if response_ids is not None and len(response_ids) != length:
        yield f"not as long as the response: {length} tokens; the response has {len(response_ids)}"
        response_ids = None
    yield from _id_problems(row.topk_ids, rules.top_p < 1)
    yield from _probability_problems(row, rules, response_ids)


def response_set_problems(responses: ResponseSet, ids_below: int | None) -> Iterator[str]:
    """Yields the problems of a response set that has the right columns.

    Ids are below ``ids_below``, the size of the tokenizer's vocabulary if it is known. A student whose embedding matrix
    is padded may sample other ids.
    """
    table, info = responses.table, responses.info
    sampled_below = ids_below if info.sampling is None else None
    rows = [
        (example_id, list_row(table["prompt_ids"], row), list_row(table["response_ids"], row))
        for row, example_id in enumerate(table["example_id"].to_pylist())
    ]
    empty = [row for row, (_, prompt, response) in enumerate(rows) if not (len(prompt) and len(response))]
    if empty:
        yield f"{_rows(empty)}: an empty prompt or response"
        return
    outside = [
        row
        for row, (_, prompt, response) in enumerate(rows)
        if not _in_range(prompt, ids_below) or not _in_range(response, sampled_below)
    ]
    if outside:
        yield f"{_rows(outside)}: ids that the vocabulary lacks"
    keys = table["key"].to_pylist()
    strangers = [row for row, (key, (_, *ids)) in enumerate(zip(keys, rows, strict=True)) if key != sequence_key(*ids)]
    if strangers:
        yield f"{_rows(strangers)}: the key is not the digest of the prompt's and the response's ids"
    elif (made := make_response_set(info, rows)).info != info or made.id != responses.id:
        yield "its counts, its order or its digest of the example ids are not those of its rows"


def error_problems(table: pa.Table) -> Iterator[str]:
    """Yields the problems of the rounding errors that a lossy table has beside its rows."""
    errors = [table[field.name].to_numpy() for field in ERRORS]
    faulty = np.flatnonzero([not (np.isfinite(row).all() and min(row) >= 0) for row in zip(*errors, strict=True)])
    if len(faulty):
        yield f"{_rows(faulty.tolist())}: rounding errors that are missing, or not numbers"


def sample_problems(response_ids: NDArray[np.int32]) -> Iterator[str]:
    """Yields the problems of a sample, int32 [T]."""
    if len(response_ids) == 0 or not _in_range(response_ids, None):
        yield "an empty response, or ids that no vocabulary has"


def _id_problems(ids_TK: NDArray[np.int32], with_padding: bool) -> Iterator[str]:
    padding_TK = ids_TK == PADDING
    if padding_TK.any() and not (with_padding and not padding_TK[:, 0].any() and _rising(padding_TK)):
        yield "padding where an id must be"
    elif not _in_range(ids_TK[~padding_TK], None):
        yield f"ids that no vocabulary has: {ids_TK.min()} to {ids_TK.max()}"
    sorted_TK = np.sort(ids_TK, axis=1)
    if ((sorted_TK[:, 1:] == sorted_TK[:, :-1]) & (sorted_TK[:, 1:] != PADDING)).any():
        yield "the same id twice at one position"


def _probability_problems(row: SignalRow, rules: SignalRules, response_ids: NDArray[np.int32] | None) -> Iterator[str]:
    logprobs_TK = row.topk_logprobs.astype(np.float64)
    tail_T, token_T = row.tail_logprob.astype(np.float64), row.token_logprobs.astype(np.float64)
    if not (
        (logprobs_TK <= FLOAT32_ERROR).all() and (tail_T <= FLOAT32_ERROR).all() and (token_T <= FLOAT32_ERROR).all()
    ):
        yield "log-probabilities above 0, or not numbers"
        return
    if not np.isfinite(token_T).all():
        yield "a token of the response with the probability 0"
    if not _rising(-logprobs_TK):
        yield "log-probabilities that do not fall"
    masses_TK = np.exp(logprobs_TK)
    errors_TK = np.where(np.isfinite(logprobs_TK), np.abs(logprobs_TK), 0) * FLOAT16_ERROR
    if rules.lossy:
        errors_TK = np.minimum(COARSEST, LOGPROB_STEP / np.maximum(masses_TK, LOGPROB_STEP)) / 2
    rounding_TK = masses_TK * np.expm1(errors_TK)
    off_T = np.abs(masses_TK.sum(axis=1) + np.exp(tail_T) - 1) - rounding_TK.sum(axis=1)
    if rules.lossy:
        off_T -= np.exp(tail_T) * np.where(np.isfinite(tail_T), np.abs(tail_T), 0) * FLOAT16_ERROR
    if (off_T > FLOAT32_ERROR).any():
        place = int(off_T.argmax())
        mass = masses_TK[place].sum() + np.exp(tail_T[place])
        yield f"mass + tail is not 1: {mass:.6f} at token {place}"
    most_T = (masses_TK + rounding_TK).sum(axis=1) + FLOAT32_ERROR
    short_T = (row.topk_ids == PADDING).any(axis=1) & (most_T < rules.top_p)
    if rules.top_p < 1 and short_T.any():
        place = int(short_T.argmax())
        yield f"fewer ids than K have less mass than {rules.top_p:g}: {masses_TK[place].sum():.6f} at token {place}"
    if response_ids is not None:
        own_T = np.maximum(token_T, GRID[-1] if rules.lossy else FLOAT16_LOWEST)
        most_TK = FLOAT32_ERROR + errors_TK + (np.abs(token_T[:, None]) * FLOAT16_ERROR if rules.lossy else 0)
        off_TK = own_T[:, None] - np.maximum(logprobs_TK, FLOAT16_LOWEST)
        listed_TK = row.topk_ids == response_ids[:, None]
        if not (np.abs(off_TK) <= most_TK)[listed_TK].all():
            yield "the response's tokens have other log-probabilities than the same ids in the top K"
        # The ids of the top K are the likeliest: another id is at most as likely as each of them.
        above_TK = (off_TK > most_TK) & (row.topk_ids != PADDING)
        if above_TK[~listed_TK.any(axis=1)].any():
            yield "the response's tokens are likelier than ids in the top K, but not among them"
    if row.token_advantages is not None and row.topk_advantages is not None:
        possible_TK = np.isfinite(logprobs_TK) & (row.topk_ids != PADDING)
        if not (np.isfinite(row.token_advantages).all() and np.isfinite(row.topk_advantages[possible_TK]).all()):
            yield "advantages that are not numbers"


def _in_range(ids: NDArray[np.int32], below: int | None) -> bool:
    """Whether all ids are at least 0 and less than ``below``; without it, than the size of any vocabulary."""
    return bool(len(ids) == 0 or (ids.min() >= 0 and ids.max() < (TOP_K_LIMIT if below is None else below)))


def _rising(values_TK: NDArray[Any]) -> bool:
    """Whether no value is below the one before it."""
    return bool((values_TK[:, 1:] >= values_TK[:, :-1]).all())


def _rows(numbers: list[int]) -> str:
    return f"row {numbers[0]}" + (f" and {len(numbers) - 1} more" if len(numbers) > 1 else "")
