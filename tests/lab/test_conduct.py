"""``adpa lab`` on a real laboratory that is too small to learn anything."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest
from tests.conftest import heed_signals

from adpa.errors import OptionError
from adpa.lab.conduct import lab
from adpa.lab.report import MethodResult, StudyReport
from adpa.lab.study import read_study

STUDY = """
seeds: [3]
tuning_seeds: [1]
prompts: 20
laboratory:
  pairs: 1600
  operations: [copy]
  teacher: {layers: 1, width: 16, pretraining_steps: 3, fine_tuning_epochs: 1}
  student: {width: 16, pretraining_steps: 3, fine_tuning_epochs: 1}
options: {num_train_epochs: 0.1, learning_rate: 3.0e-3, batch_size: 32, micro_batch_size: 32}
methods:
  SFT: {objective: sft, trials: [{learning_rate: 1.0e-3}, {learning_rate: 3.0e-3}]}
  DPO: {objective: dpo, control: SFT}
  DCKD: {objective: dckd, control: SFT}
  ADPA+: {objective: adpa, after: DCKD}
variants:
  prior: {objective: adpa, plausibility: 0, prior: true, kl_weight: 1}
"""


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(STUDY)
    return path


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path, study: Path) -> None:
    with pytest.raises(OptionError, match="not empty, and no study; name another directory"):
        lab(tmp_path, study)
    assert sorted(tmp_path.iterdir()) == [study]


def test_a_study_of_other_settings_is_not_gone_on_with(tmp_path: Path, study: Path) -> None:
    output = tmp_path / "lab"
    output.mkdir()
    (output / "study.json").write_text(json.dumps({"prompts": 500}))
    with pytest.raises(
        OptionError, match="a study of other settings was begun there: its tuning_seeds and prompts and"
    ):
        lab(output, study)


@pytest.mark.parametrize(
    ("begun_by", "found"),
    [({"adpa": "0.0.1"}, "adpa 0.0.1"), ({}, "an adpa that did not write down its version")],
)
def test_a_study_of_another_version_is_not_gone_on_with(
    begun_by: dict[str, str], found: str, tmp_path: Path, study: Path
) -> None:
    output = tmp_path / "lab"
    output.mkdir()
    (output / "study.json").write_text(json.dumps(read_study(study).settings() | begun_by))
    with pytest.raises(OptionError) as caught:
        lab(output, study)
    assert str(caught.value) == (
        f"--output {output}: the study there was begun by {found}; this is adpa {version('adpa')}; "
        "name another directory, so that all results are of one version"
    )


@pytest.mark.parametrize(
    ("seeds", "workers", "message"),
    [
        ([3, 4, 3], 2, "--seed: seed 3 occurs twice"),
        ([1], 2, "seed 1 is both tuned on and reported"),
        ([3], 0, "--workers 0; expected at least 1"),
    ],
)
def test_seeds_and_workers_are_checked_before_anything_is_done(
    seeds: list[int], workers: int, message: str, tmp_path: Path, study: Path
) -> None:
    with pytest.raises(OptionError, match=message):
        lab(tmp_path / "lab", study, seed=seeds, workers=workers)
    assert not (tmp_path / "lab").exists()


def results(report: StudyReport) -> list[MethodResult]:
    return report.methods + report.variants


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_study_that_was_killed_goes_on_and_ends_as_one_that_was_not(tmp_path: Path, study: Path) -> None:
    command = [sys.executable, "-m", "adpa", "lab", "--study", str(study), "--output", str(tmp_path / "killed")]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    while not list(tmp_path.glob("killed/seed-3/results/DPO.json")):
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("killed/seed-*/results/*.json")}

    went_on, whole = lab(tmp_path / "killed", study, workers=1), lab(tmp_path / "whole", study, workers=1)
    assert all(path.stat().st_mtime_ns == at for path, at in done.items())
    assert results(went_on) == results(whole)
    assert whole.versions == [version("adpa")]
    assert [one.name for one in results(whole)] == ["SFT student", "teacher", "SFT", "DPO", "DCKD", "ADPA+", "prior"]
    assert whole.methods[2].options["learning_rate"] in (1e-3, 3e-3)
    for name in ("results.parquet", "tables.md", "rewards.png", "advantages.png"):
        assert (tmp_path / "whole" / name).stat().st_size > 0

    more = lab(tmp_path / "whole", study, seed=[3, 4], workers=2)
    assert more.seeds == [3, 4]
    assert not (tmp_path / "whole" / "gamma.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_a_stopped_study_leaves_no_process_behind(number: int, exit_code: int, tmp_path: Path, study: Path) -> None:
    study.write_text(STUDY.replace("tuning_seeds: [1]", "tuning_seeds: [1, 2]"))
    output = tmp_path / "lab"
    command = [sys.executable, "-m", "adpa", "lab", "--study", str(study), "--output", str(output), "--workers", "1"]
    process = subprocess.Popen(
        command,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=heed_signals,
    )
    while not (output / "seed-1" / "log.txt").exists():
        assert process.poll() is None
        time.sleep(0.1)
    with pytest.raises(OptionError, match="another adpa lab is working there; wait for it, or stop it"):
        lab(output, study)
    children = psutil.Process(process.pid).children(recursive=True)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    assert process.wait(60) == exit_code
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
    assert not (output / "seed-2").exists(), "the other seeds were begun"


@pytest.mark.slow
def test_a_run_that_fails_ends_the_study_with_the_seed_and_the_reason(tmp_path: Path, study: Path) -> None:
    study.write_text(STUDY.replace("micro_batch_size: 32", "micro_batch_size: 5").replace("[3]", "[3, 4]"))
    with pytest.raises(OptionError, match="seed 1: --micro-batch-size 5 does not divide the 32 examples"):
        lab(tmp_path / "lab", study, workers=1)
    assert not (tmp_path / "lab" / "seed-3").exists()
