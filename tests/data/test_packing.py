from collections.abc import Sequence

import torch
from accelerate.utils import send_to_device
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data.makers import token_ids
from torch.utils.data._utils.pin_memory import pin_memory

from adpa.data.packing import HostLengths, PackedSequences, pack_sequences
from adpa.data.sequences import TokenSequence, sequence_key


def sequence(prompt: Sequence[int], response: Sequence[int]) -> TokenSequence:
    ids = token_ids(*prompt), token_ids(*response)
    return TokenSequence(sequence_key(*ids), *ids)


def tensors(packed: PackedSequences) -> dict[str, torch.Tensor]:
    return {name: each for name, each in vars(packed).items() if name != "lengths"}


def values(packed: PackedSequences) -> dict[str, list[int]]:
    return {name: tensor.flatten().tolist() for name, tensor in tensors(packed).items()}


PAIR = [sequence([1, 2, 3], [4, 5]), sequence([1, 2, 3], [6]), sequence([7], [8, 9])]


def test_sequences_stand_end_to_end() -> None:
    assert values(pack_sequences(PAIR, share_prompts=False)) == {
        "input_ids": [1, 2, 3, 4, 5, 1, 2, 3, 6, 7, 8, 9],
        "position_ids": [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2],
        "query_starts": [0, 5, 9, 12],
        "key_starts": [0, 5, 9, 12],
        "key_places": list(range(12)),
        "predicts": [2, 3, 7, 9, 10],
        "labels": [4, 5, 6, 8, 9],
    }


def test_an_equal_prompt_stands_once_and_its_end_predicts_every_response() -> None:
    assert values(pack_sequences(PAIR, share_prompts=True)) == {
        "input_ids": [1, 2, 3, 4, 5, 6, 7, 8, 9],
        "position_ids": [0, 1, 2, 3, 4, 3, 0, 1, 2],
        "query_starts": [0, 5, 6, 9],
        "key_starts": [0, 5, 9, 12],
        "key_places": [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8],
        "predicts": [2, 3, 2, 6, 7],
        "labels": [4, 5, 6, 8, 9],
    }


def test_prompts_are_shared_by_their_tokens_alone() -> None:
    """Not a part of a prompt, not a prompt that another one begins with; but that of another example."""
    sequences = [sequence([1, 2], [3]), sequence([1, 2, 3], [4]), sequence([2], [3]), sequence([1, 2], [5])]
    packed = pack_sequences(sequences, share_prompts=True)
    assert packed.input_ids.tolist() == [[1, 2, 3, 1, 2, 3, 4, 2, 3, 5]]
    assert packed.lengths == HostLengths(queries=(3, 4, 2, 1), keys=(3, 4, 2, 3))


PROMPTS = st.sampled_from([[1], [2], [1, 2], [1, 2, 3, 1]])
RESPONSES = st.lists(st.integers(1, 3), min_size=1, max_size=5)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.tuples(PROMPTS, RESPONSES), min_size=1, max_size=7), st.booleans())
def test_every_sequence_is_in_the_row_and_nothing_else_is(
    pairs: list[tuple[list[int], list[int]]], share: bool
) -> None:
    packed = pack_sequences([sequence(prompt, response) for prompt, response in pairs], share)
    (row,), (positions,) = packed.input_ids.tolist(), packed.position_ids.tolist()
    own_start, predicted, seen = 0, iter(packed.predicts.tolist()), set()
    keys = packed.key_places.split(packed.lengths.keys)
    for (prompt, response), queries, places in zip(
        pairs, packed.lengths.queries, (each.tolist() for each in keys), strict=True
    ):
        assert [row[place] for place in places] == prompt + response
        assert [positions[place] for place in places] == list(range(len(places)))
        assert places[-queries:] == list(range(own_start, own_start + queries))
        assert queries == len(response) if share and tuple(prompt) in seen else queries == len(places)
        for number in range(len(response)):
            assert next(predicted) == places[len(prompt) - 1 + number]
        own_start += queries
        seen.add(tuple(prompt))
    assert own_start == len(row)
    assert packed.labels.tolist() == [token for _, response in pairs for token in response]
    for starts, lengths in ((packed.query_starts, packed.lengths.queries), (packed.key_starts, packed.lengths.keys)):
        assert starts.diff().tolist() == list(lengths)
        assert starts[0] == 0
    dtypes = {name: tensor.dtype for name, tensor in tensors(packed).items()}
    assert dtypes == dict.fromkeys(dtypes, torch.int64) | dict.fromkeys(("query_starts", "key_starts"), torch.int32)


def test_packed_sequences_move_to_a_device_together_and_their_lengths_stay_on_the_host() -> None:
    packed = pack_sequences(PAIR, share_prompts=True)
    moved = packed.to(torch.device("meta"))
    assert {tensor.device.type for tensor in tensors(moved).values()} == {"meta"}
    assert moved.lengths == packed.lengths == pin_memory(packed.lengths) == send_to_device(packed.lengths, "meta")
