"""Scoring with transformers: runs anywhere, and is the oracle of every other engine.

Shapes: B sequences, L tokens, N response rows of the batch, d hidden width, V vocabulary rows, K ids, C rows a chunk.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adpa.data.batches import pad_sequences
from adpa.data.encoding import TokenSequence
from adpa.data.signals import SignalRow
from adpa.errors import ModelError, OptionError
from adpa.pipeline.checkpoint import Checkpoint
from adpa.pipeline.lm_head import check_head, hidden_states, read_head

ROWS_PER_CHUNK = 1024


class HfScorer:
    """Scores with a transformers model; the head sees response rows only.

    The head runs in float32 whatever the model's dtype: logits in bfloat16 leave the top K full of ties.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: str, device: torch.device) -> None:
        self._model = checkpoint.load(dtype, device).eval()
        check_head(self._model)
        self._head = read_head(self._model).float()
        self._name = checkpoint.name

    @torch.inference_mode()
    def top_k(self, sequences: Sequence[TokenSequence], top_k: int) -> list[SignalRow]:
        """See ``Scorer.top_k``."""
        if top_k > len(self._head.weight):
            raise OptionError(
                f"--top-k {top_k}: {self._name} has {len(self._head.weight)} tokens",
                "lower --top-k to at most that",
            )
        chunks = [_teacher_logprobs(logits_CV, labels_C, top_k) for logits_CV, labels_C, _ in self._logits(sequences)]
        token_logprobs, ids, logprobs, tail = (torch.cat(parts).cpu().numpy() for parts in zip(*chunks, strict=True))
        return [
            SignalRow(sequence.key, token_logprobs[rows], ids[rows], logprobs[rows], tail[rows])
            for sequence, rows in _row_slices(sequences)
        ]

    @torch.inference_mode()
    def logprobs_at(
        self, sequences: Sequence[TokenSequence], topk_ids: Sequence[NDArray[np.int32]]
    ) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """See ``Scorer.logprobs_at``."""
        largest = max(int(ids.max()) for ids in topk_ids)
        if largest >= len(self._head.weight):
            raise ModelError(
                f"{self._name}: the teacher gives probability to the token id {largest}, which this model lacks: it "
                f"has {len(self._head.weight)} tokens",
                "use the reference that the teacher was made from",
            )
        ids_NK = torch.from_numpy(np.concatenate(topk_ids)).to(self._model.device, torch.int64)
        own, at_ids = [], []
        for logits_CV, labels_C, rows in self._logits(sequences):
            lse_C1 = logits_CV.logsumexp(dim=1, keepdim=True)
            own.append((logits_CV.gather(1, labels_C[:, None]) - lse_C1).squeeze(1))
            at_ids.append(logits_CV.gather(1, ids_NK[rows]) - lse_C1)
        own_N, at_ids_NK = torch.cat(own).cpu().numpy(), torch.cat(at_ids).cpu().numpy()
        return [(own_N[rows], at_ids_NK[rows]) for _, rows in _row_slices(sequences)]

    def close(self) -> None:
        """See ``Scorer.close``."""
        del self._model, self._head
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _logits(self, sequences: Sequence[TokenSequence]) -> Iterator[tuple[Tensor, Tensor, slice]]:
        """Float32 logits [C, V], own tokens [C] and row numbers, chunk by chunk over the response rows."""
        hidden_ND, labels_N = self._response_hidden(sequences)
        for start in range(0, len(labels_N), ROWS_PER_CHUNK):
            rows = slice(start, start + ROWS_PER_CHUNK)
            yield self._head.logits(hidden_ND[rows].float()), labels_N[rows], rows

    def _response_hidden(self, sequences: Sequence[TokenSequence]) -> tuple[Tensor, Tensor]:
        """Hidden states [N, d] of the positions that predict a response token, and those tokens [N]."""
        padded = pad_sequences(sequences).to(self._model.device)
        hidden_BLd = hidden_states(self._model, padded.input_ids, padded.attention_mask)
        return hidden_BLd[padded.predicts], padded.labels


def _teacher_logprobs(logits_CV: Tensor, labels_C: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Own token's log-probability [C], top-K ids [C, K] and log-probabilities [C, K], log of the rest's mass [C].

    The tail is the log-sum-exp over the complement: 1 − Σp has no digits left where the teacher is sure.
    """
    lse_C = logits_CV.logsumexp(dim=1)
    own_C = logits_CV.gather(1, labels_C[:, None]).squeeze(1) - lse_C
    values_CK, ids_CK = logits_CV.topk(top_k, dim=1)
    tail_C = logits_CV.scatter_(1, ids_CK, -torch.inf).logsumexp(dim=1) - lse_C
    return own_C, ids_CK.to(torch.int32), values_CK - lse_C[:, None], tail_C


def _row_slices(sequences: Sequence[TokenSequence]) -> Iterator[tuple[TokenSequence, slice]]:
    start = 0
    for sequence in sequences:
        stop = start + len(sequence.response_ids)
        yield sequence, slice(start, stop)
        start = stop
