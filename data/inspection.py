"""Responses token by token, each token with the numbers of a scoring."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from adpa.data.cache.selection import ScoredSet
from adpa.data.cache.signal_rows import PADDING
from adpa.data.pieces import texts_in_place

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALTERNATIVES = 5


@dataclass(frozen=True)
class Alternative:
    """A token of the teacher's top K; ``advantage`` is none without a reference. Its text is a ``Piece.label``."""

    id: int
    text: str
    probability: float
    advantage: float | None


@dataclass(frozen=True)
class InspectedToken:
    """A token of a response.

    Attributes:
        id: its id.
        text: the text that it adds: whole characters, or none; together the texts are the response.
        part: which of the tokens that make a character together it is, from 1; the first one has the text.
        label: its text where it stands alone; see ``Piece``.
        special: whether it is a special token, or ends a response.
        logprob: the teacher's log-probability.
        advantage: teacher minus reference; none without a reference.
        alternatives: the teacher's most probable tokens here, by falling probability.
    """

    id: int
    text: str
    part: int
    label: str
    special: bool
    logprob: float
    advantage: float | None
    alternatives: list[Alternative]

    @property
    def probability(self) -> float:
        """The teacher's probability."""
        return math.exp(self.logprob)

    @property
    def value(self) -> float:
        """The value that colours the token: the advantage; without a reference, the log-probability."""
        return self.logprob if self.advantage is None else self.advantage


@dataclass(frozen=True)
class InspectedResponse:
    """A response token by token, and its prompt as text."""

    example_id: str
    prompt: str
    tokens: list[InspectedToken]


def inspect_responses(
    scored: ScoredSet, rows: Sequence[int], tokenizer: "PreTrainedTokenizerBase"
) -> list[InspectedResponse]:
    """Reads some responses of a set, by their row numbers."""
    table = scored.responses.table.take(list(rows))
    special_ids = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special_ids |= set(scored.responses.info.ends)
    numbers = scored.signals.locate(table["key"])
    responses = []
    for place, number in enumerate(numbers):
        signals = scored.signals.row(int(number))
        ids = table["response_ids"][place].values.to_numpy()
        top_ids = signals.topk_ids[:, :ALTERNATIVES]
        top_probabilities = np.exp(signals.topk_logprobs[:, :ALTERNATIVES].astype(np.float64)).tolist()
        top_advantages = (
            [[None] * top_ids.shape[1]] * len(ids)
            if signals.topk_advantages is None
            else signals.topk_advantages[:, :ALTERNATIVES].tolist()
        )
        tokens = [
            InspectedToken(
                id=int(ids[t]),
                text=piece.text,
                part=piece.part,
                label=piece.label,
                special=int(ids[t]) in special_ids,
                logprob=float(signals.token_logprobs[t]),
                advantage=None if signals.token_advantages is None else float(signals.token_advantages[t]),
                alternatives=[
                    Alternative(*fields)
                    for fields in zip(
                        top_ids[t].tolist(), piece.alternatives, top_probabilities[t], top_advantages[t], strict=True
                    )
                    if fields[0] != PADDING
                ],
            )
            for t, piece in enumerate(texts_in_place(tokenizer, ids, np.maximum(top_ids, 0)))
        ]
        prompt = tokenizer.decode(table["prompt_ids"][place].values.to_numpy(), clean_up_tokenization_spaces=False)
        responses.append(InspectedResponse(table["example_id"][place].as_py(), str(prompt), tokens))
    return responses
