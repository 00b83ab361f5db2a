import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from adpa.data.hub import check_hub_data
from adpa.data.rows import read_rows
from adpa.errors import DataError


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder in which copies of data sets lie; nothing listens where the Hub should be."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "copies"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "copies"


def hub_refusal(name: str) -> str:
    with pytest.raises(DataError) as caught:
        check_hub_data(name)
    return str(caught.value)


GIVE = "give --data a JSONL, JSON or Parquet file, or connect"


@pytest.mark.usefixtures("offline")
def test_a_hub_that_cannot_be_reached_is_told_at_once() -> None:
    problem = "no such file or directory, and the Hub cannot be asked: offline (Connection refused)"
    assert hub_refusal("org/name") == f"org/name: {problem}; {GIVE}"


@pytest.mark.usefixtures("offline")
def test_the_switch_of_the_hub_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    problem = "no such file or directory, and the Hub cannot be asked: offline (HF_HUB_OFFLINE is set)"
    assert hub_refusal("org/name") == f"org/name: {problem}; {GIVE}"


@pytest.mark.usefixtures("offline")
def test_a_hub_name_that_is_near_a_file_may_be_meant_to_be_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prefs.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    assert hub_refusal("prefs").endswith("offline (Connection refused); did you mean prefs.jsonl?")


@pytest.mark.parametrize(
    ("name", "copy"), [("org/name", "org___name"), ("org/UltraFeedback", "org___ultra_feedback"), ("imdb", "imdb")]
)
def test_a_copy_of_a_data_set_is_used_offline(name: str, copy: str, offline: Path) -> None:
    (offline / copy).mkdir(parents=True)
    check_hub_data(name)


class Missing(BaseHTTPRequestHandler):
    """Answers as the Hub does for what it does not have."""

    def do_HEAD(self) -> None:
        self.send_response(404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def answering(offline: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with HTTPServer(("127.0.0.1", 0), Missing) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield
        server.shutdown()
        thread.join()


@pytest.mark.usefixtures("answering")
def test_a_hub_that_answers_is_asked() -> None:
    check_hub_data("org/name")


@pytest.mark.usefixtures("offline")
def test_reading_from_a_hub_that_cannot_be_reached_ends_at_once() -> None:
    with pytest.raises(DataError, match=r"^org/name: .* the Hub cannot be asked: offline"):
        next(read_rows("org/name"))
