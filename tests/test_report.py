"""``--report``: a whole file or a stream of its own, and never a file that the command reads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import Models, Row, WriteRows
from typer.testing import CliRunner

from adpa import cli, precompute


@pytest.fixture(scope="module")
def cache(models: Models, preference_rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of two pairs."""
    folder = tmp_path_factory.mktemp("report")
    data = folder / "prefs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in preference_rows[:2]))
    precompute(teacher=str(models.teacher), data=str(data), cache=folder / "cache", top_k=3)
    return folder / "cache"


def verify(cache: Path, report: str, redirection: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """``adpa cache verify``, by a shell."""
    command = f"{sys.executable} -m adpa cache verify {cache} --report {report} {redirection}"
    return subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_on_standard_output_the_summary_is_alone(name: str, cache: Path, runner: CliRunner) -> None:
    done = runner.invoke(cli.app, ["cache", "verify", str(cache), "--report", name])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["rows"] == 8
    assert done.stderr.startswith("no fault in ")
    assert not Path("-").exists()


def test_the_first_example_makes_way_too(
    models: Models, preference_rows: list[Row], write_rows: WriteRows, tmp_path: Path, runner: CliRunner
) -> None:
    options = ["--teacher", str(models.teacher), "--data", str(write_rows(preference_rows[:2]))]
    done = runner.invoke(cli.app, ["precompute", *options, "--cache", str(tmp_path / "c"), "--report", "-"])
    assert json.loads(done.stdout)["scored"] == 4
    assert "First example" in done.stderr
    assert "adpa precompute" in done.stderr


@pytest.mark.parametrize("name", ["/dev/stderr", "/dev/fd/2", "/proc/self/fd/2"])
def test_on_standard_error_the_table_stays_where_it_is(name: str, cache: Path, runner: CliRunner) -> None:
    done = runner.invoke(cli.app, ["cache", "verify", str(cache), "--report", name])
    assert json.loads(done.stderr)["rows"] == 8
    assert done.stdout.startswith("no fault in ")


@pytest.mark.slow
def test_a_file_that_standard_output_is_appended_to_keeps_what_it_has(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "log").write_text("kept\n")
    assert verify(cache, "/dev/stdout", ">> log", tmp_path).returncode == 0
    first, _, rest = (tmp_path / "log").read_text().partition("\n")
    assert (first, json.loads(rest)["rows"]) == ("kept", 8)


@pytest.mark.slow
def test_a_pipe_and_a_device_are_written_and_not_replaced(cache: Path, tmp_path: Path) -> None:
    done = verify(cache, ">(cat > copy)", "| cat", tmp_path)
    assert done.returncode == 0
    os.mkfifo(tmp_path / "pipe")
    done = verify(cache, "pipe", "& cat pipe > other; wait", tmp_path)
    assert json.loads((tmp_path / "other").read_text())["rows"] == 8
    assert (tmp_path / "pipe").is_fifo()


def test_a_link_stays_a_link(cache: Path, tmp_path: Path, runner: CliRunner) -> None:
    (tmp_path / "report.json").write_text("old")
    (tmp_path / "link").symlink_to("report.json")
    done = runner.invoke(cli.app, ["cache", "verify", str(cache), "--report", str(tmp_path / "link")])
    assert done.exit_code == 0
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "report.json").read_text())["rows"] == 8


@pytest.mark.parametrize(
    ("report", "message"),
    [
        ("{data}", "{data}: --data names it too; name another file"),
        ("{folder}/../data/d.jsonl", "{folder}/../data/d.jsonl: --data names it too; name another file"),
        ("{hard}", "{hard}: --data names it too; name another file"),
        ("{config}", "{config}: --config names it too; name another file"),
        ("{teacher}/config.json", "{teacher}/config.json: one of the files of --teacher {teacher}; name a new file"),
        ("{cache}/report.json", "{cache}/report.json: lies in the cache {cache}; name a place outside of it"),
        ("{cache}", "{cache}: lies in the cache {cache}; name a place outside of it"),
        ("{folder}", "{folder}: cannot be written there; name a file in an existing directory"),
        ("{folder}/no/r", "{folder}/no/r: cannot be written there; name a file in an existing directory"),
    ],
)
def test_a_place_of_another_option_is_refused_before_the_work(
    report: str, message: str, recorded: dict[str, object], runner: CliRunner, tmp_path: Path
) -> None:
    places = {name: tmp_path / name for name in ("folder", "data", "teacher", "cache", "hard", "config")}
    for name in ("folder", "data", "teacher", "cache"):
        places[name].mkdir()
    places["data"] /= "d.jsonl"
    places["data"].write_text("{}")
    places["hard"].hardlink_to(places["data"])
    (places["teacher"] / "config.json").write_text("{}")
    places["config"].write_text("top-k: 3\n")
    options = [f"--{name}={places[name]}" for name in ("teacher", "data", "cache", "config")]
    done = runner.invoke(cli.app, ["precompute", *options, f"--report={report.format(**places)}"])
    assert (done.exit_code, done.stderr) == (2, f"adpa: --report {message.format(**places)}\n")
    assert not recorded
    assert places["data"].read_text() == "{}"


EARLIER = {"rows": 20, "used": 20, "scored": 40, "seconds": 9.7}  # of an adpa whose summary had fewer keys


@pytest.mark.parametrize("option", ["teacher", "reference", "student"])
def test_an_earlier_summary_in_the_folder_of_a_model_is_replaced(
    option: str, recorded: dict[str, object], runner: CliRunner, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    report = tmp_path / "run" / "summary.json"
    report.write_text(json.dumps(EARLIER))
    places = {"teacher": "T", "data": "d", "cache": "c"} | {option: str(tmp_path / "run")}
    words = [f"--{name}={place}" for name, place in places.items()]
    done = runner.invoke(cli.app, ["precompute", *words, f"--report={report}"])
    assert (done.exit_code, done.stderr) == (0, "")
    assert json.loads(report.read_text()) == {"done": True}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", '{"model_type": "llama", "seconds": 1}'),
        ("adpa.json", '{"objective": "kd", "terms": {}, "scoring": null, "steps": 5, "seconds": 2}'),
        ("merges.txt", "a b"),
        ("notes.json", "[1, 2]"),
        ("empty.json", "{}"),
        ("broken.json", '{"rows": 20, "used"'),
    ],
)
def test_no_other_file_of_a_model_or_of_a_run_is(name: str, content: str, runner: CliRunner, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    file, run = tmp_path / "run" / name, tmp_path / "run"
    file.write_text(content)
    begun = f"distill --objective kd --student S --cache c --output {run} --resume-from-checkpoint last"
    compared = f"evaluate --student {run} --baseline b --teacher T --reference R --data d"
    for option, words in {"output": begun, "student": compared}.items():
        done = runner.invoke(cli.app, [*words.split(), f"--report={file}"])
        problem = f"--report {file}: one of the files of --{option} {run}; name a new file"
        assert (done.exit_code, done.stderr) == (2, f"adpa: {problem}\n")
    assert file.read_text() == content


def test_a_page_is_no_place_of_another_option_either(cache: Path, tmp_path: Path, runner: CliRunner) -> None:
    page = str(tmp_path / "page")
    done = runner.invoke(cli.app, ["inspect", str(cache), "--html", page, "--report", page])
    assert (done.exit_code, done.stderr) == (2, f"adpa: --report {page}: --html names it too; name another file\n")
    done = runner.invoke(cli.app, ["inspect", str(cache), "--html", str(cache / "page")])
    assert done.stderr.startswith(f"adpa: --html {cache}/page: lies in the cache")
    assert not (cache / "page").exists()


@pytest.mark.parametrize("words", ["inspect {} --html -", "cache export {} --output -"])
def test_only_the_summary_goes_to_standard_output(words: str, cache: Path, runner: CliRunner) -> None:
    done = runner.invoke(cli.app, words.format(cache).split())
    option = words.split()[-2]
    assert (done.exit_code, done.stderr) == (2, f"adpa: {option} -: not a file; write ./- for a file of this name\n")
