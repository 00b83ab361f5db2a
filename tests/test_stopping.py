"""A command that is stopped, or whose output nobody takes, ends with a line that is true, and without a traceback."""

import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from tests.conftest import heed_signals
from typer.testing import CliRunner

from adpa import cli
from adpa.data.cache.format import prepare_cache

GOES_ON = "the same command goes on from what is stored"
PRECOMPUTE = "precompute --teacher ./t --data d --cache c"
DISTILL = "distill --objective kd --student s --cache c --output o"
EVALUATE = "evaluate --student s --baseline b --teacher t --reference r --data d"
AT_WORK = {  # a function that each command calls at its beginning
    PRECOMPUTE: ("precompute.check_writable", GOES_ON),
    f"{PRECOMPUTE} --dry-run": ("precompute.check_writable", "nothing was written"),
    DISTILL: ("distill.objective_terms", "nothing was written; the same command starts anew"),
    f"{DISTILL} --save-steps 5": ("distill.objective_terms", "nothing was written; the same command starts anew"),
    EVALUATE: ("evaluate._check_inputs", "the same command starts anew; --cache keeps samples and scores"),
    f"{EVALUATE} --cache c": ("evaluate._check_inputs", GOES_ON),
    "inspect c": ("inspect.select_scored", "the cache is as it was"),
    "cache ls c": ("cache.ls.check_cache", "the cache is as it was"),
    "cache verify c": ("cache.verify._check_marker", "the cache is as it was"),
    "cache gc c": ("cache.gc.check_cache", "the cache is as it was"),
    "cache gc c --yes": ("cache.gc.check_cache", "the cache is whole; the same command does the rest"),
    "cache pack c": ("cache.pack.check_cache", "the cache is whole; the same command does the rest"),
    "cache merge c d": ("cache.merge.check_cache", "the cache is whole; the same command does the rest"),
    "cache export c --output o": ("cache.export.check_cache", "nothing was written"),
}


def run_stopped(command: str, place: str, number: int, folder: Path, *before: str) -> subprocess.CompletedProcess[str]:
    """Runs a command that gets a signal when it calls a function of ``adpa.pipeline``."""
    program = (
        "import os, sys; from unittest import mock; from adpa import cli\n"
        f"def stop(*_): os.kill(os.getpid(), {number:d})\n"
        f"with mock.patch('adpa.pipeline.{place}', side_effect=stop): cli.main()"
    )
    words = [*before, sys.executable, "-c", program, *command.split()]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False, preexec_fn=heed_signals)


@pytest.mark.parametrize("command", AT_WORK)
def test_ctrl_c_says_what_happens_next(
    command: str, runner: CliRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    place, then = AT_WORK[command]
    with mock.patch(f"adpa.pipeline.{place}", side_effect=KeyboardInterrupt):
        done = runner.invoke(cli.app, command.split())
    assert (done.exit_code, done.stdout, done.stderr) == (130, "", f"adpa: interrupted; {then}\n")


AFTER_WRITING = {
    DISTILL: "start anew in another --output than o; --save-steps N keeps checkpoints",
    f"{DISTILL} --save-steps 5": "to go on from the newest checkpoint, add --resume-from-checkpoint last",
    f"{DISTILL} --save-steps 5 --resume-from-checkpoint last": "the same command goes on from the newest checkpoint",
}


@pytest.mark.parametrize("command", AFTER_WRITING)
def test_ctrl_c_in_training_says_what_happens_next_with_what_was_written(
    command: str, runner: CliRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "o" / "checkpoint-5").mkdir(parents=True)
    with mock.patch("adpa.pipeline.distill.objective_terms", side_effect=KeyboardInterrupt):
        done = runner.invoke(cli.app, command.split())
    assert (done.exit_code, done.stderr) == (130, f"adpa: interrupted; {AFTER_WRITING[command]}\n")


@pytest.mark.parametrize(
    ("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "stopped"), (signal.SIGHUP, "stopped")]
)
def test_so_does_a_process_with_a_terminal_a_scheduler_and_a_closed_terminal(
    number: int, word: str, tmp_path: Path
) -> None:
    done = run_stopped(PRECOMPUTE, "precompute.check_writable", number, tmp_path)
    assert (done.returncode, done.stderr) == (128 + number, f"adpa: {word}; {GOES_ON}\n")


def test_a_run_under_nohup_outlives_its_terminal(tmp_path: Path) -> None:
    done = run_stopped(PRECOMPUTE, "precompute.check_writable", signal.SIGHUP, tmp_path, "nohup")
    assert done.returncode == 2
    assert done.stderr.removeprefix("nohup: ignoring input\n").startswith("adpa: --teacher ./t: no such directory")


def test_ctrl_c_while_the_programme_is_imported_is_one_line(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\n"
        "class Slow:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'adpa.cli': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Slow())\n"
        "from adpa.__main__ import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, preexec_fn=heed_signals
    )
    assert (done.returncode, done.stderr) == (130, "adpa: interrupted\n")


DROPPED = """\
import os, sys, time
class Dying:
    def __del__(self):
        os.kill(os.getpid(), int(os.environ['NUMBER']))
        time.sleep(0)
"""


def test_a_ctrl_c_that_python_drops_during_an_import_comes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = (
        f"{DROPPED}class Slow:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'adpa.cli': Dying(); time.sleep(20)\n"
        "sys.meta_path.insert(0, Slow())\n"
        "from adpa.__main__ import main; main()"
    )
    monkeypatch.setenv("NUMBER", str(int(signal.SIGINT)))
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, preexec_fn=heed_signals)
    assert (done.returncode, done.stderr) == (130, "adpa: interrupted\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "stopped"), (signal.SIGHUP, "stopped")]
)
def test_so_does_every_signal_at_work(number: int, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        f"{DROPPED}from unittest import mock; from adpa.__main__ import main\n"
        "def work(*_): Dying(); time.sleep(20)\n"
        "with mock.patch('adpa.pipeline.precompute.check_writable', side_effect=work): main()"
    )
    monkeypatch.setenv("NUMBER", str(int(number)))
    command = [sys.executable, "-c", program, *PRECOMPUTE.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, preexec_fn=heed_signals)
    assert (done.returncode, done.stderr) == (128 + number, f"adpa: {word}; {GOES_ON}\n")


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["2>&-", "<&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_do_no_harm(closed: str, tmp_path: Path) -> None:
    prepare_cache(tmp_path / "c")
    for words, exit_code in (("cache ls c --report r.json", 0), ("cache ls nowhere", 2)):
        shell = f"{sys.executable} -m adpa {words} {closed}"
        done = subprocess.run(["bash", "-c", shell], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (exit_code, "")
    assert (tmp_path / "r.json").read_text().startswith('{\n  "cache": "c"')


def test_an_error_that_cannot_be_told_keeps_its_exit_code(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "adpa", "cache", "ls", "nowhere"]
        assert subprocess.run(command, cwd=tmp_path, stderr=full, check=False).returncode == 2


def test_a_working_directory_that_was_removed_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    shell = f"cd gone && rmdir ../gone && exec {sys.executable} -m adpa {PRECOMPUTE}"
    done = subprocess.run(["bash", "-c", shell], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "adpa: the working directory was removed; cd to one that is there\n")


def test_a_terminal_without_a_size_still_shows_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_cache(tmp_path / "c")
    monkeypatch.setenv("COLUMNS", "0")
    done = subprocess.run([sys.executable, "-m", "adpa", "--help"], capture_output=True, text=True, check=False)
    assert "precompute" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("command", ["--help", "--version", "cache gc --help", "cache ls c", "cache ls c --report -"])
def test_output_that_cannot_be_written_is_one_line(command: str, tmp_path: Path) -> None:
    prepare_cache(tmp_path / "c")
    with open("/dev/full", "w") as full:
        words = [sys.executable, "-m", "adpa", *command.split()]
        done = subprocess.run(words, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "adpa: standard output: No space left on device\n")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["distill --help", "cache ls c", "cache ls c --report -"])
def test_output_that_nobody_reads_ends_in_silence(command: str, tmp_path: Path) -> None:
    prepare_cache(tmp_path / "c")
    shell = f"{sys.executable} -m adpa {command} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")
