"""Texts and their tokens: which tokenizers give the text back, and which are refused, with the cause."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.data.kinds import KINDS, TEXTS, byte_level, sentencepiece, words, wrap
from tokenizers import Tokenizer, decoders, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from adpa.data.round_trip import check_round_trip, find_losses, lost_bytes
from adpa.data.vocabulary import load_tokenizer
from adpa.errors import ModelError
from adpa.lab.tokenizer import build_tokenizer

Edit = Callable[[dict[str, Any]], object]


def save(tokenizer: Tokenizer, directory: Path, label: str, **config: Any) -> Path:
    """A Llama checkpoint's tokenizer whose ``tokenizer_config.json`` names a class."""
    wrap(tokenizer).save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": label} | config))
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return directory


def edited(tokenizer: Tokenizer, edit: Edit) -> PreTrainedTokenizerBase:
    """A tokenizer whose ``tokenizer.json`` was changed."""
    description = json.loads(tokenizer.to_str())
    edit(description)
    return wrap(Tokenizer.from_str(json.dumps(description)))


# Good tokenizers.


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tokenizer_gives_its_texts_back(kind: str) -> None:
    tokenizer = wrap(KINDS[kind]())
    assert find_losses(tokenizer, TEXTS) == {}
    assert check_round_trip(tokenizer, TEXTS) == {}


def test_a_laboratorys_small_vocabulary_is_fine() -> None:
    assert check_round_trip(build_tokenizer(), ["user assistant", "assistant\n user", "user"]) == {}


def test_smollm2_gives_any_text_back(small_tokenizer: PreTrainedTokenizerBase) -> None:
    texts = [
        *TEXTS,
        "\u2581 and \u0120",
        "e\u0301 is two characters",
        "\ufeffmark",
        "\x00\x1f",
        "  ",
        "🏳️‍🌈",
        "<|endoftext|> here",
    ]
    assert find_losses(small_tokenizer, texts) == {}


@pytest.mark.parametrize("text", ["<unk> there", "Hello <unk>", "<unk><unk>"])
@pytest.mark.parametrize("kind", KINDS)
def test_text_that_spells_the_unknown_token_is_not_lost(kind: str, text: str) -> None:
    assert find_losses(wrap(KINDS[kind]()), [text.replace("there", "there!")]) == {}


@pytest.mark.parametrize("label", ["PreTrainedTokenizerFast", "LlamaTokenizerFast", "LlamaTokenizer"])
@pytest.mark.parametrize("legacy", [True, False])
def test_a_sentencepiece_file_with_its_own_label_is_fine(tmp_path: Path, label: str, legacy: bool) -> None:
    """Llama's class has a pre-tokenizer in place of the file's normalizer: other rules, the same ids."""
    tokenizer = load_tokenizer(save(sentencepiece(), tmp_path, label, legacy=legacy))
    assert check_round_trip(tokenizer, TEXTS) == {}


@pytest.mark.parametrize("label", ["PreTrainedTokenizerFast", "LlamaTokenizer"])
def test_the_sign_that_sentencepiece_writes_for_a_blank_is_a_blank(tmp_path: Path, label: str) -> None:
    tokenizer = load_tokenizer(save(sentencepiece(), tmp_path, label))
    assert find_losses(tokenizer, ["a \u2581b", "Hello\u2581there!"]) == {}


@pytest.mark.parametrize("add_prefix_space", [True, False])
def test_a_blank_that_the_tokenizer_puts_in_front_is_no_loss(add_prefix_space: bool) -> None:
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    assert find_losses(wrap(tokenizer), TEXTS) == {}


# Wrong labels.


@pytest.mark.parametrize("label", ["LlamaTokenizerFast", "LlamaTokenizer"])
def test_a_byte_level_file_that_is_labelled_llama_is_refused(tmp_path: Path, label: str) -> None:
    tokenizer = load_tokenizer(save(byte_level(), tmp_path, label))
    assert find_losses(tokenizer, ["Hello there!"]) == {"Hello there!": "comes back as 'Hellothere!'"}
    with pytest.raises(ModelError) as caught:
        check_round_trip(tokenizer, TEXTS)
    assert str(caught.value) == (
        f"{tmp_path}: the tokenizer gets 7 of 7 texts of the data wrong: transformers loads it as LlamaTokenizer, and "
        "this class replaces the pre_tokenizer, decoder of its tokenizer.json; the first one, 'Hello there!', comes "
        'back as \'Hellothere!\'; set "tokenizer_class": "PreTrainedTokenizerFast" in its tokenizer_config.json'
    )


@pytest.mark.parametrize("label", ["GPT2Tokenizer", "GPT2TokenizerFast", "Qwen2Tokenizer"])
def test_a_sentencepiece_file_that_is_labelled_byte_level_is_refused(tmp_path: Path, label: str) -> None:
    tokenizer = load_tokenizer(save(sentencepiece(), tmp_path, label))
    replaced = "replaces the normalizer, pre_tokenizer, decoder of its tokenizer.json"
    with pytest.raises(
        ModelError, match=f"wrong: transformers loads it as {label.removesuffix('Fast')}, .* {replaced}"
    ):
        check_round_trip(tokenizer, TEXTS)


def with_single_digits() -> Tokenizer:
    tokenizer = byte_level()
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return tokenizer


@pytest.mark.parametrize("label", ["GPT2Tokenizer", "GPT2TokenizerFast", "Qwen2Tokenizer"])
def test_where_a_class_keeps_the_text_but_not_the_rules_the_file_decides(tmp_path: Path, label: str) -> None:
    """SmolLM2 is published so: digits one by one, and a label whose class takes them together."""
    loaded = load_tokenizer(save(with_single_digits(), tmp_path, label))
    assert [len(ids) for ids in loaded(["1234"])["input_ids"]] == [4]
    assert check_round_trip(loaded, ["1234 past noon", "It's 1234", "Hello there!"]) == {}


@pytest.mark.parametrize("model_type", ["qwen2", "gemma", "llama"])
def test_a_file_without_a_label_decides_whatever_class_the_model_has(tmp_path: Path, model_type: str) -> None:
    """transformers takes the class of some model types instead."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    for label in ("PreTrainedTokenizerFast", "TokenizersBackend"):
        loaded = load_tokenizer(save(with_single_digits(), tmp_path, label))
        assert [len(ids) for ids in loaded(["1234"])["input_ids"]] == [4]
        assert check_round_trip(loaded, TEXTS) == {}


def test_other_tokens_than_those_of_the_file_are_refused_though_all_text_comes_back(tmp_path: Path) -> None:
    directory = save(with_single_digits(), tmp_path, "GPT2Tokenizer")
    loaded = AutoTokenizer.from_pretrained(directory)
    texts = ["1234 past noon", "It's 1234", "Hello there!"]
    assert [len(ids) for ids in loaded(["1234"])["input_ids"]] == [2]
    assert list(find_losses(loaded, texts).values()) == ["has other tokens by its tokenizer.json"] * 2
    with pytest.raises(ModelError, match=r"gets 2 of 3 texts .* as GPT2Tokenizer, and this class replaces the pre_tok"):
        check_round_trip(loaded, texts)


def test_a_label_that_cannot_be_loaded_is_refused_with_the_same_advice(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match='set "tokenizer_class": "PreTrainedTokenizerFast"'):
        load_tokenizer(save(byte_level(), tmp_path, "T5Tokenizer"))


# Wrong rules.


def test_a_vocabulary_without_some_bytes_is_refused() -> None:
    def drop_byte(description: dict[str, Any]) -> None:
        model = description["model"]
        model["vocab"] = {token: index for token, index in model["vocab"].items() if "Ã" not in token}
        model["merges"] = [pair for pair in model["merges"] if "Ã" not in "".join(pair)]

    tokenizer = edited(byte_level(), drop_byte)
    assert find_losses(tokenizer, ["Café"]) == {"Café": "comes back as 'Caf�'"}
    with pytest.raises(ModelError, match="gets 2 of 3 texts of the data wrong: its vocabulary lacks 1 of the 256 byte"):
        check_round_trip(tokenizer, ["Café", "Straße", "Hello"])


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_a_file_without_a_decoder_is_refused(kind: str) -> None:
    tokenizer = edited(KINDS[kind](), lambda description: description.update(decoder=None))
    with pytest.raises(ModelError, match=r"its tokenizer.json has no decoder; .*; set the decoder that fits"):
        check_round_trip(tokenizer, ["that question", "there, Hello", "noon past"])


def test_without_a_decoder_missing_bytes_are_not_the_cause() -> None:
    def damage(description: dict[str, Any]) -> None:
        description["decoder"] = None
        description["model"]["vocab"].pop("ÿ")

    with pytest.raises(ModelError, match=r"its tokenizer.json has no decoder; "):
        check_round_trip(edited(byte_level(), damage), ["that question", "there, Hello", "noon past"])


def test_a_tokenizer_that_splits_text_at_random_is_refused() -> None:
    tokenizer = edited(byte_level(), lambda description: description["model"].update(dropout=0.1))
    with pytest.raises(ModelError, match=r"splits text at random \(dropout 0.1\); set the dropout of the model"):
        check_round_trip(tokenizer, ["Hello"])


def test_a_byte_level_file_without_its_split_is_refused() -> None:
    tokenizer = edited(byte_level(), lambda description: description.update(pre_tokenizer=None))
    with pytest.raises(ModelError, match=r"'Hello there!', comes back as 'Hellothere!'; take the tokenizer files of"):
        check_round_trip(tokenizer, TEXTS)


def test_white_space_that_a_wrong_decoder_loses_is_seen() -> None:
    tokenizer = sentencepiece()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", ""), decoders.ByteFallback(), decoders.Fuse()])
    assert find_losses(wrap(tokenizer), ["Hello there!"]) == {"Hello there!": "comes back as 'Hellothere!'"}


# Unknown tokens, and few losses.


@pytest.mark.parametrize(
    ("kind", "text", "place"),
    [("unigram", "one €", "€"), ("wordpiece", "Hello <unk> €", "€"), ("words", "Hello Horatio", "Horatio")],
)
def test_an_unknown_token_is_a_loss(kind: str, text: str, place: str) -> None:
    assert find_losses(wrap(KINDS[kind]()), [text]) == {text: f"has the unknown token at {place!r}"}


def test_a_single_lost_text_is_returned() -> None:
    assert check_round_trip(wrap(words()), ["Hello there!", "unseen"]) == {
        "unseen": "has the unknown token at 'unseen'"
    }


def test_less_than_one_in_a_hundred_is_returned_and_repeats_do_not_count() -> None:
    vocabulary = Tokenizer.from_str(words().to_str())
    vocabulary.add_tokens([f"word{number}" for number in range(200)])
    known = [f"word{number}" for number in range(199)]
    tokenizer = wrap(vocabulary)
    assert list(check_round_trip(tokenizer, [*known, "new", "new"])) == ["new"]
    with pytest.raises(ModelError, match="gets 2 of 200 texts of the data wrong; the first one, 'new', has the unkn"):
        check_round_trip(tokenizer, [*known[:198], "new", "other"])
    assert len(check_round_trip(tokenizer, [*known, "word199", "Hello", "new", "other"])) == 2


def test_the_message_shows_the_place_in_a_long_text() -> None:
    tokenizer = wrap(words())
    tokenizer.backend_tokenizer.decoder = decoders.Replace("1234", "4321")
    text = " ".join(TEXTS[1:3])
    assert find_losses(tokenizer, [text]) == {
        text: 'has "tion.Idonotknow.It\'s1234pastnoon", which comes back as "tion.Idonotknow.It\'s4321pastnoon"'
    }


def test_the_bytes_that_a_vocabulary_lacks_are_known(tokenizer: PreTrainedTokenizerBase) -> None:
    lost = lost_bytes(tokenizer)
    assert 0xF1 in lost
    for byte in range(128):
        text = chr(byte)
        assert (byte in lost) == (tokenizer(text, add_special_tokens=False)["input_ids"] == [])
    for character in "é中🙂\U00040000":
        comes_back = tokenizer.decode(tokenizer(character, add_special_tokens=False)["input_ids"])
        assert bool({*character.encode()} & {*lost}) == (comes_back != character)


def test_a_tokenizer_that_is_not_byte_level_loses_no_bytes() -> None:
    assert lost_bytes(wrap(KINDS["words"]())) == b""
    assert lost_bytes(wrap(KINDS["sentencepiece"]())) == b""
