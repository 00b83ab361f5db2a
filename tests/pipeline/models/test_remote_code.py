"""Code beside the weights of a model: run only if allowed, part of the identity if run, kept in what is saved."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.pipeline.conftest import Filled
from tests.pipeline.own_code import AUTO_MAP, MODELING, edit_json, with_own_code
from transformers import LlamaForCausalLM

from adpa.errors import ModelError
from adpa.pipeline.models.checkpoint import open_checkpoint
from adpa.pipeline.models.remote_code import code_files

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def own(few_words: Filled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_own_code(few_words.models.teacher, tmp_path_factory.mktemp("own") / "teacher")


def copy(own: Path, tmp_path: Path) -> Path:
    return shutil.copytree(own, tmp_path / "copy")


def digest(directory: Path, trust_remote_code: bool = True) -> str:
    return open_checkpoint(str(directory), trust_remote_code=trust_remote_code).identity.digest


def test_code_runs_only_if_the_user_allows_it(own: Path) -> None:
    with pytest.raises(ModelError) as caught:
        open_checkpoint(str(own)).load("float32", CPU)
    assert str(caught.value) == (
        f"{own}: OwnForCausalLM needs code from its repository, which can do all that you can; "
        "read it, then add --trust-remote-code"
    )
    model = open_checkpoint(str(own), trust_remote_code=True).load("float32", CPU)
    assert [type(each).__name__ for each in (model.config, model, model.base_model)] == [
        "OwnConfig",
        "OwnForCausalLM",
        "OwnModel",
    ]


def test_what_is_run_is_part_of_the_identity(own: Path, tmp_path: Path) -> None:
    changed = copy(own, tmp_path)
    assert digest(changed) == digest(own)
    (changed / "train.py").write_text("nothing that the model imports")
    assert digest(changed) == digest(own)
    (changed / "modeling_own.py").write_text(MODELING.replace("2 *", "3 *"))
    assert digest(changed) != digest(own)
    assert digest(changed, trust_remote_code=False) == digest(own, trust_remote_code=False)


def test_imports_of_the_code_are_part_of_it(own: Path, tmp_path: Path) -> None:
    directory = copy(own, tmp_path)
    assert [file.name for file in code_files("it", directory)] == ["configuration_own.py", "modeling_own.py"]
    (directory / "modeling_own.py").write_text("from .helpers import FACTOR\n" + MODELING)
    with pytest.raises(ModelError, match=r"its code imports helpers\.py, which is missing; complete the checkpoint"):
        code_files("it", directory)
    (directory / "helpers.py").write_text("FACTOR = 2\n")
    assert "helpers.py" in {file.name for file in code_files("it", directory)}


def test_a_model_that_transformers_has_keeps_its_identity_until_its_code_is_run(
    few_words: Filled, tmp_path: Path
) -> None:
    plain = few_words.models.teacher
    directory = shutil.copytree(plain, tmp_path / "native")
    edit_json(directory / "config.json", auto_map={"AutoModelForCausalLM": "modeling_own.Native"})
    without_code = digest(directory, trust_remote_code=False)
    code = "from transformers import LlamaForCausalLM\nclass Native(LlamaForCausalLM):\n    pass\n"
    (directory / "modeling_own.py").write_text(code)
    assert digest(directory, trust_remote_code=False) == without_code
    assert digest(directory) != without_code
    assert type(open_checkpoint(str(directory)).load("float32", CPU)) is LlamaForCausalLM
    trusted = open_checkpoint(str(directory), trust_remote_code=True).load("float32", CPU)
    assert type(trusted).__name__ == "Native"
    assert digest(plain) == digest(plain, trust_remote_code=False)  # it has no code


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (
            "org/other--modeling_own.OwnForCausalLM",
            r"its code lies in another repository, org/other, and may change there; copy its \.py files beside the "
            r"weights, and take org/other-- out of the auto_map in config\.json",
        ),
        (
            "modeling_other.OwnForCausalLM",
            r"names the code 'modeling_other\.OwnForCausalLM', and found no modeling_oth",
        ),
        ("modeling_own", r"names the code 'modeling_own'"),
        (7, r"names the code 7"),
    ],
)
def test_code_that_is_not_beside_the_weights_is_refused(
    reference: Any, message: str, own: Path, tmp_path: Path
) -> None:
    directory = copy(own, tmp_path)
    edit_json(directory / "config.json", auto_map=AUTO_MAP | {"AutoModelForCausalLM": reference})
    with pytest.raises(ModelError, match=message):
        _ = open_checkpoint(str(directory), trust_remote_code=True).identity


@pytest.mark.parametrize(
    ("file", "code", "message"),
    [
        ("modeling_own.py", "import no_such_package\n", "not found in your environment: no_such_package"),
        ("modeling_own.py", "class OwnForCausalLM(:\n", "invalid syntax"),
        ("configuration_own.py", "raise RuntimeError('by itself')\n", "its config.json cannot be read: by itself"),
    ],
)
def test_an_error_of_the_code_is_one_line(file: str, code: str, message: str, own: Path, tmp_path: Path) -> None:
    directory = copy(own, tmp_path)
    (directory / file).write_text(code)
    with pytest.raises(ModelError, match=message):
        open_checkpoint(str(directory), trust_remote_code=True).load("float32", CPU)


def test_each_of_two_directories_of_one_name_runs_its_own_code_or_is_refused(own: Path, tmp_path: Path) -> None:
    """transformers would run the first one's, because the configuration's code is the same."""
    other = shutil.copytree(own, tmp_path / own.name)
    (other / "modeling_own.py").write_text(MODELING.replace("2 *", "3 *"))
    open_checkpoint(str(own), trust_remote_code=True).load("float32", CPU)
    with pytest.raises(ModelError, match="transformers has loaded other code from another directory of the same name"):
        open_checkpoint(str(other), trust_remote_code=True).load("float32", CPU)


def test_the_head_is_loaded_alone(own: Path) -> None:
    checkpoint = open_checkpoint(str(own), trust_remote_code=True)
    head, model = checkpoint.load_head("float32", CPU), checkpoint.load("float32", CPU)
    assert torch.equal(head.weight, model.get_output_embeddings().weight)


def test_the_files_of_the_hub_include_code_only_if_it_may_run(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(own)

    monkeypatch.setattr("adpa.pipeline.models.model_names.snapshot_download", download)
    open_checkpoint("org/model")
    open_checkpoint("org/model", trust_remote_code=True)
    assert ["*.py" in patterns for patterns in asked] == [False, True]


def test_a_saved_model_has_its_code(own: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(own), trust_remote_code=True)
    checkpoint.load("float32", CPU).save_pretrained(tmp_path / "saved")
    checkpoint.tokenizer.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["auto_map"] == AUTO_MAP
    again = open_checkpoint(str(tmp_path / "saved"), trust_remote_code=True)
    assert code_files("it", again.directory)
    assert type(again.load("float32", CPU)).__name__ == "OwnForCausalLM"


def test_another_process_gets_the_permission_and_no_class_of_the_code(own: Path) -> None:
    checkpoint = open_checkpoint(str(own), attn_implementation="eager", trust_remote_code=True)
    assert type(checkpoint.config).__name__ == "OwnConfig"
    sent = pickle.dumps(checkpoint)
    assert b"transformers_modules" not in sent
    received = pickle.loads(sent)
    assert received == checkpoint
    assert received.load("float32", CPU).config._attn_implementation == "eager"
