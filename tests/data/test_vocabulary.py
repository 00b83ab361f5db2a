from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
from tests.data.json_files import edit_json
from transformers import PreTrainedTokenizerBase

from adpa.data.vocabulary import check_same_vocabulary, digest_tokenizer, load_tokenizer
from adpa.errors import ModelError


def test_a_tokenizer_has_the_same_digests_in_any_directory(
    tokenizer: PreTrainedTokenizerBase, smollm2: Path, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    assert digest_tokenizer(load_tokenizer(tmp_path)) == digest_tokenizer(load_tokenizer(smollm2))


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
    with pytest.raises(ModelError, match=r"'<think>' has the id 49152 in the first and no id in the second"):
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
