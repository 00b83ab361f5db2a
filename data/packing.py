"""Token sequences end to end in one row, without padding; equal prompts may stand in it once.

Shapes: S sequences, T tokens of the row, N response tokens, M tokens of all sequences, a prompt counted with each of
its responses.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adpa.data.sequences import TokenIds, TokenSequence


@dataclass(frozen=True)
class PackedSequences:
    """A row of sequences, each a piece of it: the tokens that no sequence before it has brought.

    A piece attends, causally, to the places of its whole sequence, the last of which are its own. That is the
    variable-length attention with ``causal`` of FlashAttention (from 2.1), whose last query sees the last key.

    Attributes:
        input_ids: int64 [1, T].
        position_ids: int64 [1, T], the position of each token in its sequence.
        query_lengths: int64 [S], tokens of each piece, in the order of the row; T in all.
        key_lengths: int64 [S], tokens of each sequence; M in all.
        key_places: int64 [M], the place in the row of each token of each sequence.
        predicts: int64 [N], the places whose next token is a response token: a shared prompt's last one several times.
        labels: int64 [N], those response tokens, sequence by sequence.
    """

    input_ids: Tensor
    position_ids: Tensor
    query_lengths: Tensor
    key_lengths: Tensor
    key_places: Tensor
    predicts: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "PackedSequences":
        """The same on another device."""
        return PackedSequences(*(tensor.to(device) for tensor in vars(self).values()))


def pack_sequences(sequences: Sequence[TokenSequence], share_prompts: bool) -> PackedSequences:
    """Packs a batch of sequences, in their order; every prompt has at least one token.

    Args:
        sequences: the sequences.
        share_prompts: have the prompts that are equal, token by token, once.
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
    labels_N = np.concatenate([sequence.response_ids for sequence in sequences])
    arrays = (
        np.concatenate(row)[None],
        np.concatenate(positions)[None],
        np.array(query_lengths),
        np.array(list(map(len, sequences))),
        np.concatenate(places),
        np.concatenate(predicts),
        labels_N,
    )
    return PackedSequences(*(torch.from_numpy(array.astype(np.int64)) for array in arrays))
