"""Scores from hidden states: an engine runs the decoder, and adpa runs the head, on response rows only.

The logits are float32 in every model dtype: with logits in bfloat16, the top K would be full of ties.

Shapes: N response rows of a batch, d hidden width, V vocabulary rows, K ids, J = K + 1 requested ids, C rows a chunk.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adpa.data.cache.signal_rows import SignalRow
from adpa.errors import ModelError, OptionError
from adpa.kernels.teacher_rows import BLOCK_BYTES, logprobs_at, teacher_rows
from adpa.pipeline.models.devices import release_memory
from adpa.pipeline.models.lm_head import LmHead
from adpa.pipeline.scoring.score import Batch, ReferenceLogprobs

CHUNK_BYTES = 1 << 30


def chunk_rows(head: LmHead, top_k: int) -> int:
    """Number of rows, at least 1, whose hidden states, logits and signals take `CHUNK_BYTES`."""
    V, d = head.weight.shape
    return max(1, CHUNK_BYTES // (4 * (d + V) + 16 * top_k))


def bytes_beside_decoder(head: LmHead) -> int:
    """GPU memory of a `HeadScorer` without its decoder, for every K: the head, a chunk and the work on its rows."""
    return head.nbytes + CHUNK_BYTES + BLOCK_BYTES


class Decoder(Protocol):
    """A model without its head."""

    def response_hidden(self, batches: Sequence[Batch]) -> Iterator[Tensor]:
        """For each batch, the hidden states [N, d] at positions that predict a response token, in the model's dtype."""
        ...

    def close(self) -> None:
        """Frees the model's memory."""
        ...


class HeadScorer:
    """A ``Scorer`` of a decoder and a head of the same dtype. The logits are float32."""

    def __init__(self, name: str, decoder: Decoder, head: LmHead) -> None:
        self._name = name
        self._decoder = decoder
        self._head = head if head.weight.is_cuda else head.float()

    def top_k(self, batches: Sequence[Batch], top_k: int) -> Iterator[list[SignalRow]]:
        """See ``Scorer.top_k``."""
        if top_k > len(self._head.weight):
            raise OptionError(
                f"--top-k {top_k}: {self._name} has {len(self._head.weight)} tokens",
                "lower --top-k to at most that",
            )
        hidden = self._decoder.response_hidden(batches)
        for batch in batches:
            yield self._teacher_rows(batch, next(hidden), top_k)  # unnamed, so that it is freed before the next one

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
        token_logprobs, ids, logprobs, tail = self._by_chunks(
            hidden_Nd, _labels(batch), top_k, lambda logits_CV, labels_C: teacher_rows(logits_CV, labels_C, top_k)
        )
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
        ids_NJ = torch.cat([_labels(batch)[:, None], torch.from_numpy(np.concatenate(topk_ids))], dim=1)
        (logprobs_NJ,) = self._by_chunks(
            hidden_Nd, ids_NJ, ids_NJ.shape[1], lambda logits_CV, ids_CJ: (logprobs_at(logits_CV, ids_CJ),)
        )
        return [(logprobs_NJ[rows, 0], logprobs_NJ[rows, 1:]) for rows in _row_slices(batch)]

    def _by_chunks(
        self, hidden_Nd: Tensor, ids: Tensor, kept: int, read: Callable[[Tensor, Tensor], tuple[Tensor, ...]]
    ) -> list[NDArray[Any]]:
        """Applies `read` to the logits [C, V] and the ids of each chunk, and joins the results on the CPU.

        `kept` is the number of ids that `read` keeps for each row. A GPU computes all chunks without waiting for the
        host: ids come from pinned memory, and results go to pinned memory.
        """
        device = self._head.weight.device
        if device.type == "cuda":
            ids = ids.pin_memory()
        rows = chunk_rows(self._head, kept)
        chunks = []
        for hidden_Cd, ids_of_chunk in zip(chunks_on(device, hidden_Nd, rows), ids.split(rows), strict=True):
            columns = read(  # unnamed logits are freed before the next ones
                self._head.float32_logits(hidden_Cd.to(self._head.weight.dtype)),
                ids_of_chunk.to(device, non_blocking=True),
            )
            chunks.append([column.to("cpu", non_blocking=True) for column in columns])
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        return [torch.cat(column).numpy() for column in zip(*chunks, strict=True)]


def chunks_on(device: torch.device, hidden_Nd: Tensor, rows: int) -> Iterator[Tensor]:
    """Yields the hidden states in chunks [C, d] of ``rows`` rows on a device. A chunk is valid until the next one.

    A GPU copies a chunk from pinned memory, in a stream of its own, while it computes with the chunk before. Two
    buffers take turns.
    """
    if device.type != "cuda" or hidden_Nd.is_cuda:
        yield from (hidden_Cd.to(device) for hidden_Cd in hidden_Nd.split(rows))
        return
    computing, copying = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    buffers = hidden_Nd.new_empty(2, min(rows, len(hidden_Nd)), hidden_Nd.shape[1], device=device)
    copying.wait_stream(computing)  # queued work may still use the buffers' memory
    released = (torch.cuda.Event(), torch.cuda.Event())
    for number, hidden_Cd in enumerate(hidden_Nd.split(rows)):
        buffer_Cd = buffers[number % 2, : len(hidden_Cd)]
        with torch.cuda.stream(copying):
            copying.wait_event(released[number % 2])  # returns at once for the first two: no event is recorded
            buffer_Cd.copy_(hidden_Cd, non_blocking=True)
        computing.wait_stream(copying)
        yield buffer_Cd
        released[number % 2].record(computing)


def _labels(batch: Batch) -> Tensor:
    """The response tokens of a batch, sequence after sequence, int32 [N]."""
    return torch.from_numpy(np.concatenate([sequence.response_ids for sequence in batch]))


def _row_slices(batch: Batch) -> Iterator[slice]:
    start = 0
    for sequence in batch:
        yield slice(start, start := start + len(sequence.response_ids))
