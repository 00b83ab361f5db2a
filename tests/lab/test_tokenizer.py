from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from adpa.lab.environment import WORDS, Environment, Pair, preference_row
from adpa.lab.tokenizer import TURN_END, VOCABULARY, build_tokenizer

PAIRS = Environment().preference_pairs(50, seed=0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """The tokenizer, saved and loaded by `AutoTokenizer`, as users get it."""
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer().save_pretrained(directory)
    return AutoTokenizer.from_pretrained(directory)


def test_the_prompt_is_an_exact_prefix_of_the_conversation(tokenizer: PreTrainedTokenizerBase) -> None:
    for pair in PAIRS:
        prompt, whole = _tokens(pair, tokenizer)
        assert whole[: len(prompt)] == prompt


def test_the_response_is_its_words_and_the_end_of_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    for pair in PAIRS:
        prompt, whole = _tokens(pair, tokenizer)
        response = whole[len(prompt) :]
        assert tokenizer.convert_ids_to_tokens(response) == [*pair.chosen.split(), TURN_END]
        assert tokenizer.decode(response) == f"{pair.chosen} {TURN_END}"


def test_the_end_of_turn_ends_the_sequence_and_is_not_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.eos_token == TURN_END
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_every_word_is_one_known_token(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer(" ".join(WORDS), add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == list(WORDS)
    assert len(tokenizer) == len(VOCABULARY)


def test_a_strange_word_is_unknown_and_not_lost(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer("3 apples", add_special_tokens=False)["input_ids"] == [
        tokenizer.convert_tokens_to_ids("3"),
        tokenizer.unk_token_id,
    ]


def _tokens(pair: Pair, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    row = preference_row(pair)
    prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(row["prompt"] + row["chosen"], tokenize=False)
    ids = tokenizer([str(prompt), str(whole)], add_special_tokens=False)["input_ids"]
    return ids[0], ids[1]
