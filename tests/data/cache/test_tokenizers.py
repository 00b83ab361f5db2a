import os
from copy import deepcopy
from pathlib import Path

import pytest
from tests.data.json_files import edit_json
from transformers import PreTrainedTokenizerBase

from adpa.data.cache.documents import write_document
from adpa.data.cache.tokenizers import read_tokenizer, write_tokenizer
from adpa.data.chat_template import ChatTemplate
from adpa.data.vocabulary import digest_tokenizer
from adpa.errors import DamagedFileError, RemoteCodeError

CONVERSATION = [{"role": "user", "content": "Where is the Louvre?"}, {"role": "assistant", "content": "In Paris."}]


@pytest.fixture(scope="module")
def tokenizer(small_tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The small one: it is loaded and copied in a fraction of the time."""
    return small_tokenizer


def test_a_tokenizer_comes_back_from_the_cache(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    digests = digest_tokenizer(tokenizer)
    write_tokenizer(tmp_path, tokenizer, digests.tokenizer)
    read = read_tokenizer(tmp_path, digests.tokenizer)
    assert digest_tokenizer(read) == digests
    assert ChatTemplate(read).render(CONVERSATION) == ChatTemplate(tokenizer).render(CONVERSATION)
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
        edit_json(file, lambda content: content["model"]["vocab"].update(zyzzyva=8192))
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
    (written / "added_tokens.json").write_text('{"zyzzyva": 8192}')
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
    with pytest.raises(DamagedFileError, match="not the digest of a tokenizer"):
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
    with pytest.raises(RemoteCodeError, match="the tokenizer needs code from its repository"):
        read_tokenizer(tmp_path, written.name)
    assert not (tmp_path / "ran").exists()
