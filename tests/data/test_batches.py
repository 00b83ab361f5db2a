from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data.makers import INFO, SAMPLING, SCORING, K, response_rows, signal_row, signal_rows, teacher_row, token_ids

from adpa.data.batches import TrainingExamples, collate, count_tokens, pad_sequences
from adpa.data.cache.responses import ResponseSet, make_response_set
from adpa.data.cache.selection import TrainingSet
from adpa.data.cache.shards import write_shard
from adpa.data.cache.signal_rows import SignalRow, keep_nucleus, plain_schema, plain_table
from adpa.data.cache.signals import SignalTable, read_signals, write_signals
from adpa.data.packing import pack_sequences
from adpa.data.sequences import TokenSequence, sequence_key
from adpa.errors import DamagedFileError

EXAMPLES = [f"example-{letter}" for letter in "abcdef"]
IDS = st.lists(st.integers(0, 49151), min_size=1, max_size=6)


def sequence(prompt: Sequence[int], response: Sequence[int]) -> TokenSequence:
    ids = token_ids(*prompt), token_ids(*response)
    return TokenSequence(sequence_key(*ids), *ids)


def test_sequences_are_padded_on_the_right() -> None:
    padded = pad_sequences([sequence([1, 2, 3], [4, 2]), sequence([5], [2]), sequence([6], [7, 8, 9, 2])])
    assert padded.input_ids.tolist() == [[1, 2, 3, 4, 2], [5, 2, 0, 0, 0], [6, 7, 8, 9, 2]]
    assert padded.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert padded.predicts.tolist() == [2, 3, 5, 10, 11, 12, 13]
    assert padded.labels.tolist() == [4, 2, 2, 7, 8, 9, 2]
    assert (padded.input_ids.dtype, padded.labels.dtype, padded.predicts.dtype) == (
        torch.int64,
        torch.int64,
        torch.int64,
    )


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(IDS, IDS), min_size=1, max_size=6))
def test_exactly_the_positions_before_response_tokens_predict(pairs: list[tuple[list[int], list[int]]]) -> None:
    padded = pad_sequences([sequence(prompt, response) for prompt, response in pairs])
    labels, places = [], []
    for row, (prompt, response) in enumerate(pairs):
        whole = prompt + response
        longest = padded.input_ids.shape[1]
        for position in range(longest):
            inside = position < len(whole)
            next_is_response = len(prompt) <= position + 1 < len(whole)
            assert padded.attention_mask[row, position] == inside
            if inside:
                assert padded.input_ids[row, position] == whole[position]
            if next_is_response:
                labels.append(whole[position + 1])
                places.append(row * longest + position)
    assert padded.labels.tolist() == labels
    assert padded.predicts.tolist() == places


def test_padded_sequences_move_to_a_device_together() -> None:
    moved = pad_sequences([sequence([1], [2])]).to(torch.device("meta"))
    assert {tensor.device.type for tensor in vars(moved).values()} == {"meta"}


def response_set(name: Any, seed: int, examples: Sequence[str] = EXAMPLES) -> ResponseSet:
    sampling = SAMPLING if name == "sampled" else None
    return make_response_set(replace(INFO, name=name, sampling=sampling), response_rows(seed, examples))


def write_shuffled(cache: Path, rows: Sequence[SignalRow], seed: int, scoring: Any = SCORING) -> SignalTable:
    """Writes rows to a cache in another order, over three shards."""
    shuffled = [rows[number] for number in np.random.default_rng(seed).permutation(len(rows))]
    for start in range(3):
        write_signals(cache, scoring, shuffled[start::3])
    return read_signals(cache, scoring)


NAMES = ("chosen", "rejected", "sampled")


@pytest.mark.parametrize(
    "with_signals",
    [(), ("chosen",), ("chosen", "rejected"), ("sampled",), NAMES],
    ids=lambda names: "+".join(names) or "none",
)
@pytest.mark.parametrize("reference", [True, False], ids=["with advantages", "without advantages"])
def test_every_token_has_its_own_signals_in_its_row(
    with_signals: tuple[str, ...], reference: bool, tmp_path: Path
) -> None:
    sets = {
        "chosen": response_set("chosen", 0),
        "rejected": response_set("rejected", 1, EXAMPLES[::-1]),
        "sampled": response_set("sampled", 2, [*EXAMPLES, *EXAMPLES[::2]]),
    }
    rows = [row for number, name in enumerate(NAMES) for row in signal_rows(sets[name], 100 * number, reference)]
    signals = write_shuffled(tmp_path, rows, seed=3)
    parts = [TrainingSet(sets[name], signals if name in with_signals else None) for name in NAMES]
    examples = TrainingExamples(parts)
    assert len(examples) == len(EXAMPLES)
    batch = collate([examples[index] for index in (4, 0, 3)])

    by_key = {row.key: row for row in rows}
    expected = []
    for example_id in (EXAMPLES[4], EXAMPLES[0], EXAMPLES[3]):
        for set_number, name in enumerate(NAMES):
            for row in sets[name].table.to_pylist():
                if row["example_id"] == example_id:
                    for position, token in enumerate(row["response_ids"]):
                        expected.append((set_number, name, by_key[row["key"]], position, token))
    assert len(batch["labels"]) == len(expected) == len(batch["predicts"])
    width = K if with_signals else 0
    for number, (set_number, name, row, position, token) in enumerate(expected):
        assert batch["labels"][number] == token
        assert batch["set_number"][number] == set_number
        if name in with_signals:
            assert batch["topk_ids"][number].tolist() == row.topk_ids[position].tolist()
            assert batch["teacher_logprobs"][number].tolist() == row.topk_logprobs[position].tolist()
            assert batch["tail_logprob"][number].item() == row.tail_logprob[position]
        else:
            assert batch["topk_ids"][number].tolist() == [-1] * width
            assert batch["teacher_logprobs"][number].tolist() == [-np.inf] * width
            assert batch["tail_logprob"][number].item() == -np.inf
        advantages = row.topk_advantages if name in with_signals else None
        assert batch["advantages"][number].tolist() == (
            [0] * width if advantages is None else advantages[position].tolist()
        )
    assert {name: batch[name].dtype for name in ("set_number", "topk_ids", "teacher_logprobs", "tail_logprob")} == {
        "set_number": torch.int64,
        "topk_ids": torch.int32,
        "teacher_logprobs": torch.float32,
        "tail_logprob": torch.float32,
    }


def test_the_tokens_of_a_batch_are_those_of_its_sequences() -> None:
    examples = TrainingExamples([TrainingSet(response_set(name, seed), None) for seed, name in enumerate(NAMES)])
    chosen = [examples[5], examples[1]]
    batch = collate(chosen)
    padded = pad_sequences([item.tokens for example in chosen for item in example])
    for name in ("input_ids", "attention_mask", "predicts", "labels"):
        assert torch.equal(batch[name], getattr(padded, name))


def test_packing_places_the_tokens_otherwise_and_changes_nothing_else(tmp_path: Path) -> None:
    sets = [response_set(name, seed) for seed, name in enumerate(NAMES)]
    signals = write_shuffled(tmp_path, [row for responses in sets for row in signal_rows(responses, 7)], seed=3)
    examples = TrainingExamples([TrainingSet(responses, signals) for responses in sets])
    chosen = [examples[5], examples[1]]
    padded, placed = collate(chosen), {"input_ids", "attention_mask", "predicts"}
    for packing, share_prompts in (("sequences", False), ("prompts", True)):
        batch = collate(chosen, packing)  # type: ignore[arg-type]
        packed = vars(pack_sequences([item.tokens for example in chosen for item in example], share_prompts))
        assert batch.keys() == (padded.keys() - placed) | packed.keys()
        assert batch.pop("lengths") == packed.pop("lengths")
        assert all(torch.equal(batch[name], packed[name]) for name in packed)
        assert all(torch.equal(batch[name], padded[name]) for name in padded.keys() - placed)


def test_tokens_are_counted_alike_whatever_the_packing() -> None:
    responses = make_response_set(INFO, [("a", token_ids(1, 3), token_ids(5, 2)), ("a", token_ids(1, 3), token_ids(2))])
    examples = [TrainingExamples([TrainingSet(responses, None)])[0]]
    assert [int(count_tokens(collate(examples, packing))) for packing in ("none", "sequences", "prompts")] == [7, 7, 7]


def test_an_example_with_several_sampled_responses_has_them_all_in_their_order(tmp_path: Path) -> None:
    prompt = token_ids(1)
    sampled = make_response_set(
        replace(INFO, name="sampled", sampling=SAMPLING),
        [("b", prompt, token_ids(40, 2))] + [("a", prompt, token_ids(number, 2)) for number in (30, 10, 20)],
    )
    chosen = make_response_set(INFO, [(name, prompt, token_ids(5, 2)) for name in "ab"])
    signals = write_shuffled(tmp_path, signal_rows(sampled, seed=0), seed=1)
    examples = TrainingExamples([TrainingSet(chosen, None), TrainingSet(sampled, signals)])
    assert [[(item.set_number, item.tokens.response_ids[0]) for item in examples[index]] for index in range(2)] == [
        [(0, 5), (1, 30), (1, 10), (1, 20)],
        [(0, 5), (1, 40)],
    ]


def test_equal_responses_of_several_examples_share_one_signal_row(tmp_path: Path) -> None:
    """A key is of tokens alone, and so is what the teacher thinks of them."""
    responses = make_response_set(INFO, [(name, token_ids(1), token_ids(5, 2)) for name in "abc"])
    (row, *_) = signal_rows(responses, seed=0)
    write_signals(tmp_path, SCORING, [row])
    examples = TrainingExamples([TrainingSet(responses, read_signals(tmp_path, SCORING))])
    batch = collate([examples[index] for index in range(3)])
    assert batch["topk_ids"].tolist() == row.topk_ids.tolist() * 3


@pytest.mark.parametrize("encoding", ["compact", "plain"])
def test_signals_of_another_length_are_refused_instead_of_repeated(encoding: str, tmp_path: Path) -> None:
    """One token's signals would fit a response of any length."""
    responses = make_response_set(INFO, [("a", token_ids(1), token_ids(5, 6, 2))])
    key = responses.table["key"][0].as_py()
    row = signal_row(key, 1, seed=0)
    if encoding == "compact":
        write_signals(tmp_path, SCORING, [row])
    else:
        write_shard(SCORING.folder(tmp_path), "signals", plain_table([row], plain_schema(K)))
    examples = TrainingExamples([TrainingSet(responses, read_signals(tmp_path, SCORING))])
    with pytest.raises(DamagedFileError, match=f"{key.hex()} is of 1 tokens; its response has 3"):
        examples[0]


def test_padding_of_ragged_rows_is_padding_of_the_batch(tmp_path: Path) -> None:
    responses = make_response_set(INFO, [("a", token_ids(1), token_ids(5, 2)), ("b", token_ids(1), token_ids(6, 7, 2))])
    rows = [
        keep_nucleus(teacher_row(sequence.key, len(sequence.response_ids), 3, top_k=K, vocabulary=20), 0.5)
        for sequence in responses.sequences()
    ]
    assert any((row.topk_ids == -1).any() for row in rows)
    ragged = replace(SCORING, top_p=0.5)
    write_signals(tmp_path, ragged, rows)
    batch = collate([TrainingExamples([TrainingSet(responses, read_signals(tmp_path, ragged))])[0]])
    padding = batch["topk_ids"] == -1
    assert torch.equal(padding, torch.from_numpy(rows[0].topk_ids == -1))
    assert batch["teacher_logprobs"][padding].isneginf().all()
    assert (batch["advantages"][padding] == 0).all()
    mass = batch["teacher_logprobs"].double().exp().sum(dim=1) + batch["tail_logprob"].double().exp()
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=0, atol=1e-3)
