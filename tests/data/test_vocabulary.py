from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from tests.data.json_files import edit_json
from tests.data.kinds import KINDS, TEXTS, byte_level, sentencepiece, wrap
from tokenizers import AddedToken, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from adpa.data.vocabulary import check_same_vocabulary, digest_tokenizer, load_tokenizer, token_ids
from adpa.errors import ModelError


@pytest.fixture(scope="module")
def tokenizer(small_tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The small one: it is loaded and copied in a fraction of the time."""
    return small_tokenizer


def test_a_tokenizer_has_the_same_digests_in_any_directory(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    assert digest_tokenizer(load_tokenizer(tmp_path)) == digest_tokenizer(load_tokenizer(Path(tokenizer.name_or_path)))


def test_a_model_with_a_padded_embedding_has_the_same_vocabulary(make_model: Callable[..., Path]) -> None:
    teacher, student = load_tokenizer(make_model(1, vocab_size=49152)), load_tokenizer(make_model(2, vocab_size=49280))
    assert digest_tokenizer(teacher) == digest_tokenizer(student)
    check_same_vocabulary(teacher, student, "teacher", "student")


def test_using_a_tokenizer_does_not_change_its_digests(tokenizer: PreTrainedTokenizerBase) -> None:
    used = deepcopy(tokenizer)
    used(["a b c d e f", "a"], truncation=True, max_length=3, padding=True)
    assert digest_tokenizer(used) == digest_tokenizer(tokenizer)


def changed_digests(before: PreTrainedTokenizerBase, after: PreTrainedTokenizerBase) -> set[str]:
    old, new = vars(digest_tokenizer(before)), vars(digest_tokenizer(after))
    return {name for name in old if old[name] != new[name]}


def test_another_template_changes_the_digests_of_template_and_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    changed = deepcopy(tokenizer)
    changed.chat_template = str(tokenizer.chat_template).replace("named SmolLM", "named Smol")
    assert changed_digests(tokenizer, changed) == {"chat_template", "tokenizer"}


def test_another_end_of_sequence_changes_the_digests_of_template_and_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    changed = deepcopy(tokenizer)
    changed.eos_token = "<|endoftext|>"
    assert changed_digests(tokenizer, changed) == {"chat_template", "tokenizer"}


def test_another_token_changes_the_digests_of_vocabulary_and_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    changed = deepcopy(tokenizer)
    changed.add_tokens(["<think>"])
    assert changed_digests(tokenizer, changed) == {"vocabulary", "tokenizer"}


def test_other_merges_of_the_same_tokens_change_the_tokenizers_digest_alone(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    edit_json(tmp_path / "tokenizer.json", lambda content: content["model"]["merges"].pop())
    assert changed_digests(tokenizer, load_tokenizer(tmp_path)) == {"tokenizer"}


def test_a_directory_without_a_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: no tokenizer could be loaded")


def test_a_student_may_have_tokens_that_the_teacher_lacks(tokenizer: PreTrainedTokenizerBase) -> None:
    student = deepcopy(tokenizer)
    student.add_tokens(["<think>", "</think>"])
    check_same_vocabulary(tokenizer, student, "teacher", "student")
    with pytest.raises(ModelError, match=r"'<think>' has the id 8192 in the first and no id in the second"):
        check_same_vocabulary(student, tokenizer, "teacher", "student")


def test_a_student_with_another_token_is_refused_by_the_tokens_name(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    first, second = (str(tokenizer.convert_ids_to_tokens(index)) for index in (1000, 2000))

    def swap(content: dict[str, dict[str, dict[str, int]]]) -> None:
        content["model"]["vocab"] |= {first: 2000, second: 1000}

    tokenizer.save_pretrained(tmp_path)
    edit_json(tmp_path / "tokenizer.json", swap)
    with pytest.raises(ModelError) as caught:
        check_same_vocabulary(tokenizer, load_tokenizer(tmp_path), "big-teacher", "small-student")
    assert str(caught.value).startswith(
        f"big-teacher and small-student have different vocabularies: the token {first!r} has the id 1000 in the first "
        "and 2000 in the second"
    )


# Ids.

TURNS = (
    "<|im_start|>user\nHello there!<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nHello there!<|im_end|>\n<|im_start|>assistant\n  I do not know <|im_end|>\n",
    "  leading<|im_end|><|im_end|> <|im_start|>",
    "<|im_start| >no token<|im_st<|im_start|>",
    "<unk>a<unk> b",
    "",
)


def called(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return ids


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_call(kind: str) -> None:
    tokenizer = wrap(KINDS[kind]())
    assert token_ids(tokenizer, [*TEXTS, *TURNS]) == called(tokenizer, [*TEXTS, *TURNS])
    assert token_ids(tokenizer, []) == []


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_ids_are_those_of_the_call_where_the_place_in_the_text_counts(scheme: Any) -> None:
    tokenizer = sentencepiece()
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    assert token_ids(wrap(tokenizer), TURNS) == called(wrap(tokenizer), TURNS)


@pytest.mark.parametrize(
    "token",
    [
        AddedToken("<|im_start|>", special=True, lstrip=True),
        AddedToken("<|im_start|>", special=True, rstrip=True),
        AddedToken("<|im_start|>", special=True, normalized=True),
        AddedToken("<|im_start|>", special=True, single_word=True),
        AddedToken("!<|im", special=False, normalized=False),  # it reaches over the cut before <|im_start|>
        AddedToken("\n<|im_start|>", special=True),
        AddedToken("<|im_start|>user", special=True),
        AddedToken("lead", special=False),
    ],
)
@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "wordpiece"])
def test_ids_are_those_of_the_call_whatever_a_special_token_takes_with_it(kind: str, token: AddedToken) -> None:
    tokenizer = wrap(KINDS[kind]())
    tokenizer.add_tokens([token])
    texts = [*TURNS, "Hello there!<|im_start|>user", "x  <|im_start|>  y", "word<|im_start|>word", "\n\n<|im_start|>\n"]
    assert token_ids(tokenizer, texts) == called(tokenizer, texts)


def test_ids_are_those_of_the_call_with_special_tokens_split_or_earlier_limits() -> None:
    tokenizer = wrap(byte_level())
    expected = called(tokenizer, TURNS)
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    assert token_ids(tokenizer, TURNS) == expected
    tokenizer.split_special_tokens = True
    split = token_ids(tokenizer, TURNS)
    assert split == called(tokenizer, TURNS)
    assert split != expected


def test_ids_of_a_class_with_a_call_of_its_own_are_those_of_the_call() -> None:
    class Upper(PreTrainedTokenizerFast):
        def __call__(self, text: Any, *arguments: Any, **options: Any) -> Any:
            return super().__call__([part.upper() for part in text], *arguments, **options)

    tokenizer = Upper(tokenizer_object=byte_level())
    assert token_ids(tokenizer, ["abc"]) == wrap(byte_level())(["ABC"], add_special_tokens=False)["input_ids"]


def test_no_texts_have_no_ids_whatever_the_class() -> None:
    class Strict(PreTrainedTokenizerFast):
        def __call__(self, text: Any, *arguments: Any, **options: Any) -> Any:
            assert text, "like CodeLlamaTokenizer, it needs a text"
            return super().__call__(text, *arguments, **options)

    assert token_ids(Strict(tokenizer_object=byte_level()), []) == []
    assert token_ids(wrap(byte_level()), []) == []
