"""Scoring from hidden states: the decoder is an engine's, the head is ours and sees response rows only.

The head runs in float32 whatever the model's dtype: logits in bfloat16 leave the top K full of ties.

Shapes: N response rows of a batch, d hidden width, V vocabulary rows, K ids, J = K + 1 ids asked for, C rows a chunk.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adpa.data.signal_rows import SignalRow
from adpa.errors import ModelError, OptionError
from adpa.kernels.teacher_rows import logprobs_at, teacher_rows
from adpa.pipeline.checkpoint import release_memory
from adpa.pipeline.lm_head import LmHead
from adpa.pipeline.scoring import Batch, ReferenceLogprobs

ROWS_PER_CHUNK = 1024


class Decoder(Protocol):
    """A model without its head."""

    def response_hidden(self, batches: Sequence[Batch]) -> Iterator[Tensor]:
        """For each batch, hidden states [N, d] of the positions that predict a response token."""
        ...

    def close(self) -> None:
        """Gives the model's memory back."""
        ...


class HeadScorer:
    """A ``Scorer`` made of a decoder and a head in float32."""

    def __init__(self, name: str, decoder: Decoder, head: LmHead) -> None:
        self._name = name
        self._decoder = decoder
        self._head = head.float()

    def top_k(self, batches: Sequence[Batch], top_k: int) -> Iterator[list[SignalRow]]:
        """See ``Scorer.top_k``."""
        if top_k > len(self._head.weight):
            raise OptionError(
                f"--top-k {top_k}: {self._name} has {len(self._head.weight)} tokens",
                "lower --top-k to at most that",
            )
        hidden = self._decoder.response_hidden(batches)
        for batch in batches:
            yield self._teacher_rows(batch, next(hidden), top_k)  # no name holds it while the next one is made

    def logprobs_at(
        self, batches: Sequence[Batch], topk_ids: Iterable[Sequence[NDArray[np.int32]]]
    ) -> Iterator[list[ReferenceLogprobs]]:
        """See ``Scorer.logprobs_at``."""
        hidden = self._decoder.response_hidden(batches)
        for batch, ids in zip(batches, topk_ids, strict=True):
            yield self._reference_logprobs(batch, ids, next(hidden))

    def close(self) -> None:
        """See ``Scorer.close``."""
        self._decoder.close()
        del self._head
        release_memory()

    @torch.inference_mode()
    def _teacher_rows(self, batch: Batch, hidden_Nd: Tensor, top_k: int) -> list[SignalRow]:
        labels_N = _labels(batch)
        chunks = [teacher_rows(logits_CV, labels_N[rows], top_k) for logits_CV, rows in self._logits(hidden_Nd)]
        token_logprobs, ids, logprobs, tail = (torch.cat(parts).cpu().numpy() for parts in zip(*chunks, strict=True))
        return [
            SignalRow(sequence.key, token_logprobs[rows], ids[rows], logprobs[rows], tail[rows])
            for sequence, rows in zip(batch, _row_slices(batch), strict=True)
        ]

    @torch.inference_mode()
    def _reference_logprobs(
        self, batch: Batch, topk_ids: Sequence[NDArray[np.int32]], hidden_Nd: Tensor
    ) -> list[ReferenceLogprobs]:
        largest = max(int(ids.max()) for ids in topk_ids)
        if largest >= len(self._head.weight):
            raise ModelError(
                f"{self._name}: the teacher gives probability to the token id {largest}, which this model lacks: it "
                f"has {len(self._head.weight)} tokens",
                "use the reference that the teacher was made from",
            )
        asked_NJ = torch.cat([_labels(batch)[:, None], torch.from_numpy(np.concatenate(topk_ids))], dim=1)
        chunks = [logprobs_at(logits_CV, asked_NJ[rows]) for logits_CV, rows in self._logits(hidden_Nd)]
        logprobs_NJ = torch.cat(chunks).cpu().numpy()
        return [(logprobs_NJ[rows, 0], logprobs_NJ[rows, 1:]) for rows in _row_slices(batch)]

    def _logits(self, hidden_Nd: Tensor) -> Iterator[tuple[Tensor, slice]]:
        """Float32 logits [C, V] on the head's device, and which rows they are of."""
        for start in range(0, len(hidden_Nd), ROWS_PER_CHUNK):
            rows = slice(start, start + ROWS_PER_CHUNK)
            yield self._head.logits(hidden_Nd[rows].to(self._head.weight)), rows


def _labels(batch: Batch) -> Tensor:
    """The response tokens of a batch, one sequence after the other, int64 [N]."""
    return torch.from_numpy(np.concatenate([sequence.response_ids for sequence in batch])).long()


def _row_slices(batch: Batch) -> Iterator[slice]:
    start = 0
    for sequence in batch:
        yield slice(start, start := start + len(sequence.response_ids))
