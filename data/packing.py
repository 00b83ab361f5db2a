"""Token sequences end to end in one row, without padding; equal prompts may stand in it once.

Shapes: S sequences, T tokens of the row, N response tokens, M tokens of all sequences, a prompt counted with each of
its responses.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adpa.data.sequences import TokenIds, TokenSequence


@dataclass(frozen=True)
class HostLengths:
    """Lengths that stay on the host wherever the batch goes: reading them from a device would wait for it.

    Attributes:
        queries: tokens of each piece, in the order of the row; T in all.
        keys: tokens of each sequence; M in all.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]

    def to(self, device: torch.device, non_blocking: bool = False) -> "HostLengths":
        """Returns itself, because it is on no device."""
        return self


@dataclass(frozen=True)
class PackedSequences:
    """A row of sequences. Each adds one piece to it: its tokens that are not in the row yet.

    A piece attends, causally, to the places of its whole sequence; its own places are the last of them. FlashAttention
    (from 2.1) computes this as its variable-length attention with ``causal``: the last query sees the last key.

    Attributes:
        input_ids: int64 [1, T].
        position_ids: int64 [1, T], the position of each token in its sequence.
        query_starts: int32 [S + 1], the start of each piece in the row, and then T.
        key_starts: int32 [S + 1], the start of each sequence in ``key_places``, and then M.
        key_places: int64 [M], the place in the row of each token of each sequence.
        lengths: of pieces and sequences.
        predicts: int64 [N], the places whose next token is a response token; the last place of a shared prompt occurs
            once for each of its responses.
        labels: int64 [N], those response tokens, sequence by sequence.
    """

    input_ids: Tensor
    position_ids: Tensor
    query_starts: Tensor
    key_starts: Tensor
    key_places: Tensor
    lengths: HostLengths
    predicts: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "PackedSequences":
        """The same on another device."""
        return PackedSequences(*(each.to(device) for each in vars(self).values()))


def pack_sequences(sequences: Sequence[TokenSequence], share_prompts: bool) -> PackedSequences:
    """Packs a batch of sequences in their order; every prompt has at least one token.

    Args:
        sequences: the sequences.
        share_prompts: place equal prompts once.
    """
    first_of: dict[bytes, NDArray[np.int64]] = {}
    row: list[TokenIds] = []
    positions, places, predicts = [], [], []
    query_lengths = []
    end = 0
    for sequence in sequences:
        prompt, whole = len(sequence.prompt_ids), len(sequence)
        shared = first_of.get(sequence.prompt_ids.tobytes(), np.empty(0, dtype=np.int64))
        own = whole - len(shared)
        places_of = np.concatenate([shared, np.arange(end, end + own)])
        if share_prompts:
            first_of[sequence.prompt_ids.tobytes()] = places_of[:prompt]
        row.append(np.concatenate([sequence.prompt_ids, sequence.response_ids])[len(shared) :])
        positions.append(np.arange(len(shared), whole))
        places.append(places_of)
        predicts.append(places_of[prompt - 1 : -1])
        query_lengths.append(own)
        end += own
    lengths = HostLengths(tuple(query_lengths), tuple(map(len, sequences)))
    return PackedSequences(
        input_ids=_int64(np.concatenate(row)[None]),
        position_ids=_int64(np.concatenate(positions)[None]),
        query_starts=_starts(lengths.queries),
        key_starts=_starts(lengths.keys),
        key_places=_int64(np.concatenate(places)),
        lengths=lengths,
        predicts=_int64(np.concatenate(predicts)),
        labels=_int64(np.concatenate([sequence.response_ids for sequence in sequences])),
    )


def _int64(array: NDArray[np.integer]) -> Tensor:
    return torch.from_numpy(array.astype(np.int64))


def _starts(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
