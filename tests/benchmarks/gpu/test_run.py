"""``python -m benchmarks.gpu.run`` as a user runs it: a dry run of every part, one that fails, one that is killed."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from benchmarks.cost_model import Assumptions
from benchmarks.gpu.predictions import PREDICTIONS
from benchmarks.gpu.run import PARTS, benchmark

from adpa.errors import OptionError

pytestmark = pytest.mark.slow  # every part, as a process of its own

# Predictions about shapes and hardware that a dry run lacks.
ON_A_GPU_ALONE = {
    "time / three products, d = 896",
    "time / three products, d = 2048",
    "adpa at d = 4096, V = 131072, by 8·N·d·V",
    "host waits a micro-batch",
}


@dataclass(frozen=True)
class Run:
    """The output and the files of a run."""

    exit_code: int
    printed: str
    found: dict[str, Any]
    table: str


def command(*options: object) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu.run", *map(str, options)]


def run(output: Path, *options: object, **environment: str) -> Run:
    finished = subprocess.run(
        command("--dry-run", "--output", output, *options),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env=os.environ | {"TMPDIR": str(output)} | environment,
    )
    return Run(finished.returncode, finished.stdout, read(output), (output / "gpu-dry-run.md").read_text())


def read(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "gpu-dry-run.json").read_text())
    return found


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(tmp_path_factory.mktemp("gpu"))


def test_every_part_is_done_and_has_figures(dry_run: Run) -> None:
    assert {letter: part["state"] for letter, part in dry_run.found["parts"].items()} == dict.fromkeys(PARTS, "done")
    assert all(part["figures"] and not part["failures"] for part in dry_run.found["parts"].values())
    assert dry_run.exit_code == 0


def test_every_figure_is_printed_when_it_is_measured(dry_run: Run) -> None:
    names = [name for part in dry_run.found["parts"].values() for name in part["figures"]]
    printed = [line.strip() for line in dry_run.printed.splitlines() if line.startswith("   ")]
    assert [line for line in printed if ": skipped, " not in line] != []
    assert all(any(line.startswith(f"{name}: ") for line in printed) for name in names)


def test_the_table_has_every_figure_and_every_prediction(dry_run: Run) -> None:
    figures = [(letter, name) for letter, part in dry_run.found["parts"].items() for name in part["figures"]]
    predicted = [(prediction.part, prediction.figure) for prediction in PREDICTIONS]
    rows = [line for line in dry_run.table.splitlines() if line.startswith("| ")]
    for letter, name in {*figures, *predicted}:
        cells = name.replace("|", "\\|")
        assert sum(row.startswith(f"| {letter} | {cells} | ") for row in rows) == 1


def test_what_was_predicted_is_measured_under_the_same_name(dry_run: Run) -> None:
    missing = {one["figure"] for one in dry_run.found["predictions"] if one["measured"] is None}
    assert missing == ON_A_GPU_ALONE
    assert len(dry_run.found["predictions"]) == len(PREDICTIONS)


def test_what_a_dry_run_leaves_out_is_named(dry_run: Run) -> None:
    skipped = {one["name"]: one["reason"] for part in dry_run.found["parts"].values() for one in part["skipped"]}
    assert skipped["host waits"] == "it needs a GPU"
    assert "vLLM: skipped, a dry run starts no engine" in dry_run.printed


def test_the_rates_are_options_of_the_cost_model(dry_run: Run) -> None:
    rates = dry_run.found["rates"]
    assert rates.keys() < asdict(Assumptions()).keys()
    assert {"peak_flops", "scoring_share", "head_share", "training_share", "memory_rate", "load_rate"} <= rates.keys()
    assert f"--peak-flops {rates['peak_flops']:g}" in dry_run.found["costs"]
    assert dry_run.found["costs"] in dry_run.table


def test_a_dry_run_is_never_taken_for_a_gpu(dry_run: Run) -> None:
    assert dry_run.found["machine"]["device"] is None
    assert dry_run.table.startswith("# Measured on a CPU: a dry run, whose numbers mean nothing\n")


def test_a_part_that_fails_is_recorded_and_the_rest_goes_on(tmp_path: Path) -> None:
    found = run(tmp_path, "--parts", "ac", PYTEST_ADDOPTS="--no-such-option")
    assert found.exit_code == 1
    parts = found.found["parts"]
    assert {letter: part["state"] for letter, part in parts.items() if part["state"] != "not run"} == {
        "a": "failed",
        "c": "done",
    }
    assert parts["a"]["failures"] == [{"name": "kernels' tests", "error": "RuntimeError: pytest ended with 4"}]
    assert "RuntimeError: pytest ended with 4" in found.table


def test_what_does_not_fit_into_the_time_is_skipped_and_named(tmp_path: Path) -> None:
    found = run(tmp_path, "--parts", "c", "--minutes", 0.001)
    assert found.exit_code == 0
    assert found.found["parts"]["c"]["figures"] == {}
    assert [one["name"] for one in found.found["parts"]["c"]["skipped"]] == ["copy", "products"]
    assert "products: skipped, it may take 6 s, 0 s are left" in found.table


@pytest.fixture
def running(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A run that has written a first figure and goes on measuring."""
    options = command("--dry-run", "--output", tmp_path, "--parts", "bd")
    environment = os.environ | {"TMPDIR": str(tmp_path)}  # a killed run leaves temporary files
    with subprocess.Popen(
        options, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        while not process.stdout.readline().startswith("d: "):
            assert process.poll() is None
        yield process


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_keeps_what_it_has_and_leaves_no_process(
    running: subprocess.Popen[str], tmp_path: Path, ending: signal.Signals
) -> None:
    children = psutil.Process(running.pid).children(recursive=True)
    running.send_signal(ending)
    running.wait()
    found = read(tmp_path)
    assert found["parts"]["b"]["state"] == "done"
    assert found["parts"]["d"]["state"] in ("not run", "running")
    assert found["parts"]["b"]["figures"]
    assert {one["figure"] for one in found["predictions"]} == {prediction.figure for prediction in PREDICTIONS}
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive


def test_parts_and_data_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--parts cz: there is no part 'z'; expected letters of abcdefg"):
        benchmark("cz", True, None, 1.0, None)
    with pytest.raises(OptionError, match="no such file"):
        benchmark("c", True, tmp_path / "pairs.jsonl", 1.0, None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_one_line() -> None:
    finished = subprocess.run(command("--parts", "c"), capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert finished.stderr == "benchmarks.gpu.run: torch sees no GPU; use a machine that has one, or --dry-run\n"
    assert finished.stdout == ""
