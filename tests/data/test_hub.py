"""What the Hub answers becomes one line, about models and about data."""

import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import cast

import pytest
from tests.conftest import Models, Row

from adpa.data.hub import HubData, check_hub_data, parse_hub_data
from adpa.data.rows import read_rows
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


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("org/pairs", ("org/pairs", None, None)),
        ("org/pairs:en", ("org/pairs", "en", None)),
        ("pairs@v1.0", ("pairs", None, "v1.0")),
        ("org/pairs:en@refs/pr/1", ("org/pairs", "en", "refs/pr/1")),
        ("org/pairs@refs/convert/parquet:en", ("org/pairs", "en", "refs/convert/parquet")),
    ],
)
def test_a_data_set_is_named_with_its_configuration_and_revision(
    source: str, parts: tuple[str, str | None, str | None]
) -> None:
    assert parse_hub_data(source) == HubData(*parts)


@pytest.mark.parametrize("source", ["org/pairs:", "org/pairs@", "org/pairs:a:b", "org/pairs:a@b:c", "a@b@c", ":en"])
def test_a_name_with_other_parts_is_refused(source: str) -> None:
    with pytest.raises(DataError, match="no such file or directory, and no name that the Hub can have; check --data"):
        parse_hub_data(source)


@pytest.fixture
def pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``org/pairs``: a repository with two configurations, one of them with two splits, which lies in a folder."""
    folder = tmp_path / "repository"
    files = {"en/train": 3, "en/test": 2, "de/train": 1}
    for name, rows in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"question": f"{name} {n}", "chosen": "Yes", "rejected": "No"}) for n in range(rows)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files:\n  - split: train\n    path: en/train.jsonl\n"
        "  - split: test\n    path: en/test.jsonl\n- config_name: de\n  data_files: de/train.jsonl\n---\n"
    )
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "copies"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "copies")
    monkeypatch.setattr(
        "adpa.data.hub.check_hub_data", lambda source: replace(parse_hub_data(source), name=str(folder))
    )
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("source", "split", "prompts"),
    [
        ("org/pairs:de", None, ["de/train 0"]),
        ("org/pairs:de", "train", ["de/train 0"]),
        ("org/pairs:en", "test", ["en/test 0", "en/test 1"]),
        ("org/pairs:en", "train[1:]+test[:1]", ["en/train 1", "en/train 2", "en/test 0"]),
        ("org/pairs:en", "train[-1:]", ["en/train 2"]),
    ],
)
def test_a_configuration_of_the_hub_is_read(source: str, split: str | None, prompts: list[str], pairs: None) -> None:
    places, rows = zip(*read_rows(source, split, columns={"prompt": "question"}), strict=True)
    assert [row["prompt"] for row in cast(list[Row], rows)] == prompts
    assert all(where.startswith(source) for where in places)


@pytest.mark.parametrize(
    ("source", "split", "line"),
    [
        ("org/pairs", None, "found no configuration; expected one of en, de; name it as in org/pairs:en"),
        ("org/pairs:fr", None, "found the configuration fr; expected one of en, de; name it as in org/pairs:en"),
        ("org/pairs:enn", None, "found the configuration enn; expected one of en, de; did you mean en?"),
        ("org/pairs:en", None, "found no --split; expected one of train, test; name it with --split"),
        ("org/pairs:en", "tset[:9]", "found --split tset[:9]; expected one of train, test; did you mean test?"),
    ],
)
def test_a_wrong_configuration_or_split_of_the_hub_is_told(
    source: str, split: str | None, line: str, pairs: None
) -> None:
    with pytest.raises(DataError) as caught:
        list(read_rows(source, split))
    assert str(caught.value) == f"{source}: {line}"
