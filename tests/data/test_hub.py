"""What the Hub answers becomes one line, about models and about data."""

import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tests.conftest import Models

from adpa.data.hub import check_hub_data
from adpa.errors import DataError, ModelError
from adpa.pipeline.models.model_names import check_models, find_directory

REPOSITORIES = {  # status, and the error code that tells its cause
    "org/missing": (404, "RepoNotFound"),
    "org/private": (401, "RepoNotFound"),
    "org/gated": (403, "GatedRepo"),
    "org/versions": (404, "RevisionNotFound"),
    "org/secret": (401, ""),
    "org/broken": (500, ""),
}


class Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        name = "/".join(self.path.split("/")[3:5])
        status, code = REPOSITORIES[name]
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A Hub that gives nothing, and says why."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.chdir(tmp_path)
        yield
        server.shutdown()


REASONS = {
    "org/missing": ("the Hub has no org/missing that you may read", "{check}; if it is private, run hf auth login"),
    "org/private": ("the Hub has no org/private that you may read", "{check}; if it is private, run hf auth login"),
    "org/gated": (
        "its owner on the Hub must let you read it",
        "ask for it on the page of org/gated, then run hf auth login",
    ),
    "org/versions": ("the Hub has no such revision of org/versions", "check what follows @"),
    "org/secret": ("the Hub answers with status 401", "run hf auth login"),
    "org/broken": ("the Hub answers with status 500", "try again later"),
}


@pytest.mark.parametrize("name", REASONS)
def test_why_the_hub_gives_no_model(name: str, hub: None) -> None:
    problem, fix = REASONS[name]
    with pytest.raises(ModelError) as caught:
        find_directory(f"{name}@v1")
    fix = fix.format(check="check the name of the checkpoint")
    assert str(caught.value) == f"{name}@v1: no such directory, and {problem}; {fix}"


@pytest.mark.parametrize("name", ["org/missing", "org/gated", "org/broken"])
def test_why_the_hub_gives_no_data(name: str, hub: None) -> None:
    problem, fix = REASONS[name]
    with pytest.raises(DataError) as caught:
        check_hub_data(name)
    assert str(caught.value) == f"{name}: no such file or directory, and {problem}; {fix.format(check='check --data')}"


@pytest.mark.parametrize("copy", ["org___missing", "org___Missing", "org___mis_sing"])
def test_data_of_which_a_copy_is_there_may_be_read_offline(
    copy: str, hub: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "copies"))
    with pytest.raises(DataError):
        check_hub_data("org/missing")
    (tmp_path / "copies" / copy).mkdir(parents=True)
    check_hub_data("org/missing")


@pytest.mark.parametrize("revision", ["", "@main", f"@{'a' * 40}"])
def test_a_model_of_which_a_copy_is_there_is_found_offline(
    revision: str, hub: None, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    copy = tmp_path / "hub" / "models--org--missing"
    shutil.copytree(models.student, copy / "snapshots" / ("a" * 40))
    (copy / "refs").mkdir()
    (copy / "refs" / "main").write_text("a" * 40)
    assert find_directory(f"org/missing{revision}") == (copy / "snapshots" / ("a" * 40), "a" * 40)
    check_models({"--teacher": f"org/missing{revision}"})
    with pytest.raises(ModelError, match="org/missing@v2: no such directory, and HF_HUB_OFFLINE keeps adpa from"):
        find_directory("org/missing@v2")


@pytest.mark.parametrize("option", ["--teacher", "--baseline", "--student"])
def test_the_option_of_a_model_is_named(option: str, hub: None) -> None:
    with pytest.raises(ModelError, match=f"^{option} org/missing: no such directory, and the Hub has no org/missing"):
        check_models({option: "org/missing"})
