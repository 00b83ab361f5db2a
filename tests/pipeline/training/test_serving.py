"""The lines that serve a student and chat with it: those that work in this environment, to be copied as they are."""

import shlex
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from adpa.pipeline.training import serving
from adpa.pipeline.training.serving import serving_lines


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """transformers with its extra and without vLLM, activated, online."""

    def no_distribution(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(serving, "distribution", no_distribution)
    monkeypatch.setattr(serving, "find_spec", lambda name: name)
    monkeypatch.setattr(serving.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(serving.constants, "HF_HUB_OFFLINE", False)
    return monkeypatch


def test_transformers_serves_where_there_is_no_vllm(environment: pytest.MonkeyPatch) -> None:
    assert serving_lines("runs/x") == ["transformers serve runs/x", "transformers chat runs/x"]


def test_vllm_serves_where_it_is_installed(environment: pytest.MonkeyPatch) -> None:
    environment.setattr(serving, "distribution", lambda name: name)
    assert serving_lines("runs/x") == ["vllm serve runs/x", "vllm chat"]


def test_a_missing_extra_is_installed_first(environment: pytest.MonkeyPatch) -> None:
    environment.setattr(serving, "find_spec", lambda name: None if name == "uvicorn" else name)
    assert serving_lines("x")[0] == "pip install 'transformers[serving]'"
    assert len(serving_lines("x")) == 3


def test_offline_the_chat_may_still_ask_this_machine(environment: pytest.MonkeyPatch) -> None:
    environment.setattr(serving.constants, "HF_HUB_OFFLINE", True)
    assert serving_lines("x")[1] == "HF_HUB_OFFLINE=0 transformers chat x"


@pytest.mark.parametrize("path", ["my runs/x", "it's", "runs/γ=1", "$HOME/x"])
def test_a_shell_reads_the_path_as_it_is(path: str, environment: pytest.MonkeyPatch) -> None:
    serve, chat = serving_lines(path)
    assert shlex.split(serve) == ["transformers", "serve", path]
    assert shlex.split(chat) == ["transformers", "chat", path]


def test_a_program_outside_the_search_path_is_named_whole(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "transformers").touch()
    environment.setattr(sys, "executable", str(tmp_path / "python"))
    environment.setattr(serving.shutil, "which", lambda name: None)
    assert serving_lines("x")[0] == f"{tmp_path}/transformers serve x"
