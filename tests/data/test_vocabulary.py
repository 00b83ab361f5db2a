import json
import os
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
from tests.data.templates import STYLES
from transformers import PreTrainedTokenizerBase

from adpa.data.cache.documents import write_document
from adpa.data.vocabulary import (
    TurnEnd,
    check_same_vocabulary,
    digest_tokenizer,
    find_turn_end,
    load_tokenizer,
    read_tokenizer,
    render,
    write_tokenizer,
)
from adpa.errors import DamagedFileError, ModelError

CONVERSATION = [{"role": "user", "content": "Where is the Louvre?"}, {"role": "assistant", "content": "In Paris."}]


def edit_json(path: Path, edit: Callable[[dict], object]) -> None:  # type: ignore[type-arg]
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


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


def test_smollm2_ends_a_turn_with_im_end_and_a_newline_after_it(tokenizer: PreTrainedTokenizerBase) -> None:
    assert find_turn_end(tokenizer) == TurnEnd(tokenizer.get_vocab()["<|im_end|>"], trailing=1)


@pytest.mark.parametrize("style", STYLES)
def test_the_end_of_a_turn_is_found_in_the_template(style: str, tokenizer: PreTrainedTokenizerBase) -> None:
    styled = STYLES[style](tokenizer)
    end = TurnEnd(styled.get_vocab()[STYLES[style].end], STYLES[style].trailing)
    assert find_turn_end(styled) == end
    ids = styled(render(styled, CONVERSATION), add_special_tokens=False)["input_ids"]
    assert ids[-1 - end.trailing] == end.token_id


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (None, "the tokenizer has no chat template"),
        (
            "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}",
            "the chat template ends the assistant's turn with no special token",
        ),
        ("{{ raise_exception('No Latin') }}", "the chat template refuses a question and its answer: No Latin"),
        ("{{ messages[0]['content'] + eos_token }}", "the chat template changes the assistant's text"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_with_the_checkpoints_name(
    template: str | None, problem: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    changed = deepcopy(tokenizer)
    changed.chat_template = template
    with pytest.raises(ModelError) as caught:
        find_turn_end(changed)
    assert str(caught.value).startswith(f"{tokenizer.name_or_path}: {problem}")


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


def test_a_tokenizer_comes_back_from_the_cache(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    digests = digest_tokenizer(tokenizer)
    write_tokenizer(tmp_path, tokenizer, digests.tokenizer)
    read = read_tokenizer(tmp_path, digests.tokenizer)
    assert digest_tokenizer(read) == digests
    assert render(read, CONVERSATION) == render(tokenizer, CONVERSATION)
    text = "Ein längerer Text — with <|im_end|> and 🗼."
    assert read(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (tmp_path / "tokenizers" / digests.tokenizer).stat().st_mode & 0o777 == 0o755


def test_chat_templates_of_any_name_come_back_from_the_cache(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    named = deepcopy(tokenizer)
    names = ["tool use", "-x", ".hidden", "naïve (2)", "a..b", "rag:v1"]
    named.chat_template = {"default": tokenizer.chat_template} | dict.fromkeys(names, "{{ eos_token }}")
    digest = digest_tokenizer(named).tokenizer
    write_tokenizer(tmp_path, named, digest)
    assert read_tokenizer(tmp_path, digest).chat_template == named.chat_template


def test_a_tokenizer_that_is_there_is_not_written_again(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    digest = digest_tokenizer(tokenizer).tokenizer

    def state() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "tokenizers").rglob("*")}

    write_tokenizer(tmp_path, tokenizer, digest)
    before = state()
    write_tokenizer(tmp_path, tokenizer, digest)
    assert state() == before


def test_a_process_that_comes_second_leaves_what_the_first_wrote(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = digest_tokenizer(tokenizer).tokenizer
    directory = tmp_path / "tokenizers" / digest
    rename = os.rename

    def rename_after_another(source: Path, target: Path) -> None:
        if target == directory:
            monkeypatch.undo()
            write_tokenizer(tmp_path, tokenizer, digest)
        rename(source, target)

    monkeypatch.setattr(os, "rename", rename_after_another)
    write_tokenizer(tmp_path, tokenizer, digest)
    assert [path.name for path in directory.parent.iterdir()] == [digest]
    assert (directory / "tokenizer.json").is_file()


@pytest.mark.parametrize("damage", ["absent", "empty", "another template", "another token", "cut off", "garbage"])
def test_a_damaged_tokenizer_is_refused_by_its_path(
    damage: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    digest = digest_tokenizer(tokenizer).tokenizer
    directory = tmp_path / "tokenizers" / digest
    file = directory / "tokenizer.json"
    if damage == "empty":
        directory.mkdir(parents=True)
    elif damage != "absent":
        write_tokenizer(tmp_path, tokenizer, digest)
    if damage == "another template":
        (directory / "chat_template.jinja").write_text("{{ eos_token }}")
    elif damage == "another token":
        edit_json(file, lambda content: content["model"]["vocab"].update(zyzzyva=49152))
    elif damage == "cut off":
        file.write_bytes(file.read_bytes()[:1000])
    elif damage == "garbage":
        file.write_text('{"version": "1.0"}')
    with pytest.raises(DamagedFileError) as caught:
        read_tokenizer(tmp_path, digest)
    assert str(caught.value).startswith(f"{directory}: damaged: ")


@pytest.fixture
def written(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Path:
    """The folder of a tokenizer in the cache ``tmp_path``."""
    digest = digest_tokenizer(tokenizer).tokenizer
    write_tokenizer(tmp_path, tokenizer, digest)
    return tmp_path / "tokenizers" / digest


def test_every_file_of_a_tokenizer_is_checked_and_no_other_is_read(written: Path, tmp_path: Path) -> None:
    (written / "added_tokens.json").write_text('{"zyzzyva": 49152}')
    assert "zyzzyva" not in read_tokenizer(tmp_path, written.name).get_vocab()
    names = sorted(path.name for path in written.iterdir())
    for name in names:
        content = (written / name).read_bytes()
        (written / name).write_bytes(content[:-2] + b" " + content[-1:])  # where JSON has only blanks
        if name != "added_tokens.json":
            with pytest.raises(DamagedFileError, match=f"{written}: damaged: {name}|{written / name}: damaged: "):
                read_tokenizer(tmp_path, written.name)
        (written / name).write_bytes(content)
    read_tokenizer(tmp_path, written.name)


def test_a_tokenizer_of_version_1_has_no_digests_of_its_files(written: Path, tmp_path: Path) -> None:
    (written / "files.json").unlink()
    read_tokenizer(tmp_path, written.name)
    (written / "chat_template.jinja").write_text("{{ eos_token }}")
    with pytest.raises(DamagedFileError, match="not the tokenizer that was written"):
        read_tokenizer(tmp_path, written.name)


@pytest.mark.parametrize("digest", ["../tokenizers/0", "..", "", "/etc", "0/../0", "0\0", "tokenizer-digest"])
def test_a_digest_that_may_lead_out_of_the_cache_is_refused(digest: str, tmp_path: Path) -> None:
    with pytest.raises(DamagedFileError, match="no digest of a tokenizer"):
        read_tokenizer(tmp_path, digest)


@pytest.mark.parametrize(
    "name", ["../0", "/etc/passwd", "a/../../0", "a//b", "a/", "a/.", "", ".", "..", "a\0", "a\\b"]
)
def test_a_name_that_may_lead_out_of_the_folder_is_refused(name: str, written: Path, tmp_path: Path) -> None:
    write_document(written / "files.json", {"files": {name: "0" * 32}})
    with pytest.raises(DamagedFileError, match=r"which may lead out of the folder"):
        read_tokenizer(tmp_path, written.name)


def test_a_tokenizer_with_code_of_its_own_is_refused_and_not_run(written: Path, tmp_path: Path) -> None:
    (written / "files.json").unlink()
    edit_json(
        written / "tokenizer_config.json",
        lambda config: config.update(tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", "own.Own"]}),
    )
    (written / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    with pytest.raises(DamagedFileError, match="not the tokenizer that was written"):
        read_tokenizer(tmp_path, written.name)
    assert not (tmp_path / "ran").exists()
