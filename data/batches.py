"""From joined rows to the tensors of a step.

A training set is a response set that the objective uses, with its signals where a term needs them. An example is a
preference pair as training sees it: one token sequence of each training set, or several. Batches number the training
sets from 0.

Shapes: B sequences, L tokens of the longest, N response tokens of the batch, K ids.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pyarrow.compute import list_value_length
from torch import Tensor
from torch.utils.data import Dataset

from adpa.data.cache.selection import TrainingSet
from adpa.data.cache.signal_rows import SignalRow, check_length
from adpa.data.packing import pack_sequences
from adpa.data.sequences import Packing, TokenSequence

COLUMNS = ("prompt_ids", "response_ids")


@dataclass(frozen=True)
class PaddedSequences:
    """Token sequences side by side, padded on the right.

    Attributes:
        input_ids: int64 [B, L].
        attention_mask: int64 [B, L], 1 on tokens and 0 on padding.
        predicts: int64 [N], the places in [B · L] whose next token is a response token.
        labels: int64 [N], those response tokens, sequence by sequence.
    """

    input_ids: Tensor
    attention_mask: Tensor
    predicts: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "PaddedSequences":
        """The same on another device."""
        tensors = (self.input_ids, self.attention_mask, self.predicts, self.labels)
        return PaddedSequences(*(tensor.to(device) for tensor in tensors))


def pad_sequences(sequences: Sequence[TokenSequence]) -> PaddedSequences:
    """Pads a batch of sequences; every prompt has at least one token."""
    input_ids_BL = np.zeros((len(sequences), max(map(len, sequences))), dtype=np.int64)
    mask_BL = np.zeros_like(input_ids_BL)
    predicts: list[NDArray[np.int64]] = []
    for row, sequence in enumerate(sequences):
        prompt, whole = len(sequence.prompt_ids), len(sequence)
        input_ids_BL[row, :prompt] = sequence.prompt_ids
        input_ids_BL[row, prompt:whole] = sequence.response_ids
        mask_BL[row, :whole] = 1
        predicts.append(row * input_ids_BL.shape[1] + np.arange(prompt - 1, whole - 1))
    labels_N = np.concatenate([sequence.response_ids for sequence in sequences]).astype(np.int64)
    return PaddedSequences(*map(torch.from_numpy, (input_ids_BL, mask_BL, np.concatenate(predicts), labels_N)))


@dataclass(frozen=True)
class TrainingSequence:
    """One response of an example; ``set_number`` is the number of its training set."""

    set_number: int
    tokens: TokenSequence
    signals: SignalRow | None


class SequenceSize(NamedTuple):
    """Tokens of a training sequence; ``set_number`` is the number of its training set."""

    set_number: int
    prompt: int
    response: int


class TrainingExamples(Dataset[list[TrainingSequence]]):
    """The examples of a run, each read from the memory-mapped cache on access.

    Every training set has every example, and several times with several samples for one prompt.
    """

    def __init__(self, sets: Sequence[TrainingSet]) -> None:
        self._sequences = [one.responses.sequences() for one in sets]
        self._signals = [one.signals for one in sets]
        self._signal_rows = [
            None if one.signals is None else one.signals.locate(one.responses.table["key"]) for one in sets
        ]
        for rows in self._signal_rows:
            assert rows is None or (rows >= 0).all(), "a response without its signal row"
        examples = [set(one.responses.table["example_id"].to_pylist()) for one in sets]
        assert all(ids == examples[0] for ids in examples), "training sets of different examples"
        places: dict[str, list[tuple[int, int]]] = {}
        for number, one in enumerate(sets):
            for row, example_id in enumerate(one.responses.table["example_id"].to_pylist()):
                places.setdefault(example_id, []).append((number, row))
        self._places = list(places.values())
        self._sizes = [
            list(zip(*(list_value_length(one.responses.table[ids]).to_pylist() for ids in COLUMNS), strict=True))
            for one in sets
        ]

    def __len__(self) -> int:
        return len(self._places)

    def lengths(self, index: int) -> list[int]:
        """Tokens of each sequence of an example, without reading it."""
        return [size.prompt + size.response for size in self.sizes(index)]

    def sizes(self, index: int) -> list[SequenceSize]:
        """Sizes of each sequence of an example, without reading it."""
        return [SequenceSize(number, *self._sizes[number][row]) for number, row in self._places[index]]

    def __getitem__(self, index: int) -> list[TrainingSequence]:
        return [self._read(number, row) for number, row in self._places[index]]

    def _read(self, number: int, row: int) -> TrainingSequence:
        signals, rows = self._signals[number], self._signal_rows[number]
        tokens = self._sequences[number][row]
        if signals is None or rows is None:
            return TrainingSequence(number, tokens, None)
        signal_row = signals.row(int(rows[row]))
        check_length(signal_row, len(tokens.response_ids))
        return TrainingSequence(number, tokens, signal_row)


Collator = Callable[[Sequence[Sequence[TrainingSequence]]], dict[str, Tensor]]


def collate(examples: Sequence[Sequence[TrainingSequence]], packing: Packing = "none") -> dict[str, Tensor]:
    """Turns examples into the tensors of a batch.

    A batch has the tensors of ``PaddedSequences``, or with packing those of ``PackedSequences``, and for the N response
    tokens:

    - ``set_number``: int64 [N].
    - ``topk_ids``: int32 [N, K]; −1 in rows without signals, and where a row has fewer ids.
    - ``teacher_logprobs``: float32 [N, K].
    - ``tail_logprob``: float32 [N].
    - ``advantages``: float32 [N, K]; 0 in rows without a reference.

    K is the K of the signals, or 0 if no sequence has signals.
    """
    sequences = [sequence for example in examples for sequence in example]
    token_sequences = [sequence.tokens for sequence in sequences]
    placed = (
        pad_sequences(token_sequences)
        if packing == "none"
        else pack_sequences(token_sequences, share_prompts=packing == "prompts")
    )
    tokens = len(placed.labels)
    top_k = max((sequence.signals.topk_ids.shape[1] for sequence in sequences if sequence.signals), default=0)
    set_N = np.empty(tokens, dtype=np.int64)
    topk_ids_NK = np.full((tokens, top_k), -1, dtype=np.int32)
    logprobs_NK = np.full((tokens, top_k), -np.inf, dtype=np.float32)
    tail_N = np.full(tokens, -np.inf, dtype=np.float32)
    advantages_NK = np.zeros((tokens, top_k), dtype=np.float32)
    start = 0
    for sequence in sequences:
        rows = slice(start, start + len(sequence.tokens.response_ids))
        set_N[rows] = sequence.set_number
        if sequence.signals is not None:
            topk_ids_NK[rows] = sequence.signals.topk_ids
            logprobs_NK[rows] = sequence.signals.topk_logprobs
            tail_N[rows] = sequence.signals.tail_logprob
            if sequence.signals.topk_advantages is not None:
                advantages_NK[rows] = sequence.signals.topk_advantages
        start = rows.stop
    return vars(placed) | {
        "set_number": torch.from_numpy(set_N),
        "topk_ids": torch.from_numpy(topk_ids_NK),
        "teacher_logprobs": torch.from_numpy(logprobs_NK),
        "tail_logprob": torch.from_numpy(tail_N),
        "advantages": torch.from_numpy(advantages_NK),
    }


def computed_tokens(lengths: Sequence[int], packing: Packing) -> int:
    """Tokens that a decoder computes for these sequences, padding included; an upper bound with shared prompts."""
    return len(lengths) * max(lengths) if packing == "none" else sum(lengths)


def count_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    """Tokens of the sequences of a batch, int64 scalar, without padding. A prompt counts with each of its responses."""
    return batch["key_starts"][-1].long() if "key_starts" in batch else batch["attention_mask"].sum()
