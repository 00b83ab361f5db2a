"""The lines that serve a student and chat with it: those that work in this environment, to be copied as they are."""

import os
import shlex
import socket
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from tests.conftest import Models

from adpa.pipeline.training import serving
from adpa.pipeline.training.serving import serving_lines, transformers_lines


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """transformers with its extra and without vLLM, activated, online."""

    def no_distribution(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(serving, "distribution", no_distribution)
    monkeypatch.setattr(serving, "find_spec", lambda name: name)
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
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
    environment.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert serving_lines("x")[1] == "HF_HUB_OFFLINE=0 transformers chat x"


@pytest.mark.parametrize("path", ["my runs/x", "it's", "runs/γ=1", "$HOME/x"])
def test_a_shell_reads_the_path_as_it_is(path: str, environment: pytest.MonkeyPatch) -> None:
    serve, chat = serving_lines(path)
    assert shlex.split(serve) == ["transformers", "serve", path]
    assert shlex.split(chat) == ["transformers", "chat", path]


def test_a_program_outside_the_search_path_is_named_whole(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "transformers").touch()
    environment.setattr(sys, "executable", str(tmp_path / "python"))
    environment.setattr("shutil.which", lambda name: None)
    assert serving_lines("x")[0] == f"{tmp_path}/transformers serve x"


@pytest.mark.slow
def test_transformers_really_serves_and_chats_by_these_lines(models: Models, tmp_path: Path) -> None:
    pytest.importorskip("uvicorn")
    pytest.importorskip("openai")
    student = tmp_path / "a student"
    student.symlink_to(models.student)
    program, port = Path(sys.executable).with_name("transformers"), free_port()
    serve, chat = (shlex.split(line)[1:] for line in transformers_lines(str(student)))
    environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
    server = subprocess.Popen([program, *serve, f"--port={port}", "--device=cpu"], env=environment)
    try:
        wait_for(port)
        words = [str(program), *chat, f"http://localhost:{port}", "max_new_tokens=3", "eos_token_id=0"]
        done = subprocess.run(
            words, env=environment, input="Say hello.\n", capture_output=True, text=True, timeout=100, check=False
        )
    finally:
        server.terminate()
        server.wait()
    assert "3 tokens in" in done.stdout, done.stdout + done.stderr


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return int(server.getsockname()[1])


def wait_for(port: int) -> None:
    """Waits until a server answers on a port, two minutes at most."""
    for _ in range(240):
        with suppress(OSError), socket.create_connection(("localhost", port), timeout=1):
            return
        time.sleep(0.5)
    raise TimeoutError(f"no server on port {port}")
