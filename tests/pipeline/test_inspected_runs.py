"""Runs beside a cache: what is said of each, which curves the page has, and which directories are refused."""

import base64
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from tests.pipeline.conftest import Filled
from typer.testing import CliRunner

from adpa import cli, inspect_cache
from adpa.errors import OptionError
from adpa.pipeline.inspected_runs import inspected_run, read_run

LOGS = [{"step": step, "loss": 4.0 / step, "learning_rate": 1e-4, "nll/chosen": 3.0 / step} for step in (1, 2, 4)]
RECORD: dict[str, Any] = {
    "objective": "dckd",
    "terms": {"chosen": {"nll": 1.0, "kl": 0.25, "advantage": 0.0}, "rejected": {"nll": 0.0, "kl": 0.25}},
    "student": {"name": "/home/me/secret/small", "digest": "0"},
    "training": {
        "learning_rate": 5e-7,
        "lr_scheduler_type": "cosine",
        "batch_size": 128,
        "num_train_epochs": 1.0,
        "max_steps": -1,
        "seed": 0,
    },
    "examples": 1200,
    "steps": 4,
    "student_before": {},
    "losses": LOGS,
}


def write(folder: Path, record: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "adpa.json").write_text(json.dumps(record))
    return folder


def test_a_run_is_told_by_its_settings_and_losses(tmp_path: Path) -> None:
    run = inspected_run(tmp_path / "dckd", read_run(write(tmp_path / "dckd", RECORD)))
    assert run.describe() == f"{tmp_path / 'dckd'}: dckd, 1,200 examples, 4 steps, loss 4 to 1"
    assert run.facts() == {
        "objective": "dckd",
        "loss": "1 · nll on chosen + 0.25 · kl on chosen + 0.25 · kl on rejected",
        "student": "/home/me/secret/small",
        "learning rate": "5e-07",
        "schedule": "cosine",
        "batch size": "128",
        "epochs": "1",
        "seed": "0",
        "result": "1,200 examples, 4 steps, loss 4 to 1",
    }


def test_a_run_that_has_not_finished_says_so(tmp_path: Path) -> None:
    begun = {name: value for name, value in RECORD.items() if name not in ("steps", "examples", "losses")}
    assert inspected_run(tmp_path, begun).describe() == f"{tmp_path}: dckd, no log yet"
    one = inspected_run(tmp_path, begun | {"losses": LOGS[:1]})
    assert one.describe() == f"{tmp_path}: dckd, not finished, 1 step, loss 4 to 4"


@pytest.mark.parametrize(
    "record",
    [None, [], {}, {"objective": "sft"}, RECORD | {"losses": [{"loss": 1.0}]}, RECORD | {"student": "s"}],
    ids=["null", "list", "empty", "half", "log without a step", "other form"],
)
def test_another_file_is_no_record(record: object, tmp_path: Path) -> None:
    folder = write(tmp_path / "run", record)
    with pytest.raises(OptionError) as caught:
        read_run(folder)
    assert str(caught.value) == (
        f"--run {folder}: found no adpa.json of a run that can be read; name the --output of an adpa distill"
    )


def test_a_place_without_a_run_is_refused_before_the_cache_is_read(filled: Filled, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name, problem in (("gone", "no such directory"), ("file", "is a file"), (".", "found no adpa.json of a run")):
        with pytest.raises(OptionError, match=re.escape(f"--run {tmp_path / name}: {problem}")):
            inspect_cache(filled.cache, run=[tmp_path / name])


def test_the_page_has_the_settings_and_the_curves_of_each_run(filled: Filled, tmp_path: Path) -> None:
    runs = [write(tmp_path / "runs" / "one", RECORD), write(tmp_path / "runs" / "two", RECORD | {"objective": "kd"})]
    begun = {name: value for name, value in RECORD.items() if name != "losses"}
    runs.append(write(tmp_path / "runs" / "begun", begun))
    options = [word for run in runs for word in ("--run", str(run))]
    html = ["--html", str(runs[0] / "page.html"), "--report", str(tmp_path / "report.json")]
    words = ["inspect", str(filled.cache), "--response-set", "chosen", "--count", "1"]
    done = CliRunner().invoke(cli.app, [*words, *options, *html])
    assert (done.exit_code, done.stderr) == (0, "")
    said = done.stdout.replace("\n", "")
    assert f"run {runs[0]}: dckd, 1,200 examples, 4 steps, loss 4 to 1" in said
    assert f"run {runs[2]}: dckd, no log yet" in said
    page = (runs[0] / "page.html").read_text()
    pictures = [base64.b64decode(one) for one in re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)]
    assert len(pictures) == 2
    for picture, objective in zip(pictures, ("dckd", "kd"), strict=True):
        assert ElementTree.fromstring(picture).tag.endswith("svg")
        assert f"{objective}: 4 steps" in picture.decode()
    assert "It has no log yet, hence no curves." in page
    assert all(f"<h2>Run {name}</h2>" in page for name in ("one", "two", "begun"))
    assert "1 · nll on chosen + 0.25 · kl on chosen" in page
    assert str(tmp_path) not in page, "a page shows no folder"
    assert "/home/me" not in page
    report = json.loads((tmp_path / "report.json").read_text())
    assert [run["objective"] for run in report["runs"]] == ["dckd", "kd", "dckd"]


def test_a_page_never_replaces_the_record_of_a_run(filled: Filled, tmp_path: Path) -> None:
    run = write(tmp_path / "run", RECORD)
    words = ["inspect", str(filled.cache), "--response-set", "chosen", "--run", str(run)]
    done = CliRunner().invoke(cli.app, [*words, "--html", str(run / "adpa.json")])
    assert (done.exit_code, len(done.stderr.splitlines())) == (2, 1)
    assert f"one of the files of --run {run}" in done.stderr
    assert read_run(run) == RECORD
