"""One cache, many users: at once, from an object store, on a read-only mount."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Models, Row, WriteRows
from tests.pipeline.conftest import Filled

from adpa import distill, inspect_cache, precompute
from adpa.data.cache.locations import Location, find_location
from adpa.data.cache.responses import read_response_sets
from adpa.data.cache.signals import read_scorings, read_signals
from adpa.errors import OptionError

BRIEF: dict[str, Any] = {"batch_size": 4, "max_steps": 2, "logging_steps": 1, "device": "cpu"}
# One process imports everything; its children are ready at once.
SCRIPT = """
import json, os, sys, traceback
from pathlib import Path
from adpa import distill, precompute
from adpa.data.cache.locations import find_location

def run(stage, options):
    options["cache"] = find_location(options["cache"])
    if stage == "distill":
        distill(**options | {"output": Path(options["output"])})
    else:
        precompute(**options)

def fork(job):
    process = os.fork()
    if process == 0:
        try:
            run(*job)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return process

processes = [fork(job) for job in json.load(sys.stdin)]
sys.exit(sum(os.waitpid(process, 0)[1] != 0 for process in processes))
"""
Job = tuple[str, dict[str, Any]]


def run_at_once(*jobs: Job) -> None:
    """Runs stages, each with its options, in processes of their own at the same time."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3] / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(
        command, input=json.dumps(jobs), env=environment, text=True, stderr=subprocess.PIPE, check=False
    )
    assert done.returncode == 0, done.stderr


def contents(cache: Location) -> dict[str, set[bytes]]:
    """The keys of every response set and every scoring."""
    sets = {one.shard_prefix(): set(one.table["key"].to_pylist()) for one in read_response_sets(cache)}
    return sets | {one.id: read_signals(cache, one).keys() for one in read_scorings(cache)}


@pytest.mark.slow
def test_several_precomputes_at_once_make_what_one_makes_and_several_students_read_it(
    models: Models, preference_rows: list[Row], write_rows: WriteRows, tmp_path: Path
) -> None:
    data = [write_rows(preference_rows[first : first + 4], f"{first}.jsonl") for first in (0, 2)]
    common: dict[str, Any] = {
        "teacher": str(models.teacher),
        "reference": str(models.reference),
        "top_k": 5,
        "batch_tokens": 128,
    }
    together, alone = tmp_path / "together", tmp_path / "alone"
    run_at_once(*(("precompute", {"data": str(path), "cache": str(together), **common}) for path in (*data, data[0])))
    for path in data:
        precompute(data=str(path), cache=alone, **common)
    assert contents(together) == contents(alone)
    assert not list(together.rglob(".*"))

    (chosen, *_) = (one for one in read_response_sets(together) if one.info.name == "chosen")
    options = {"objective": "kd", "cache": str(together), "response_set": [chosen.id], **BRIEF}
    students = (models.student, models.other_student)
    run_at_once(
        *(
            ("distill", options | {"student": str(student), "output": str(tmp_path / f"trained-{number}")})
            for number, student in enumerate(students)
        )
    )
    assert len(list(tmp_path.glob("trained-*/adpa.json"))) == 2


@pytest.mark.slow
def test_a_cache_in_an_object_store_is_filled_by_two_at_once_and_trained_from(
    models: Models, preference_rows: list[Row], write_rows: WriteRows, bucket: str, tmp_path: Path
) -> None:
    cache = find_location(f"{bucket}/cache")
    options: dict[str, Any] = {
        "teacher": str(models.teacher),
        "reference": str(models.reference),
        "student": str(models.student),
        "data": str(write_rows(preference_rows[:4])),
        "top_k": 5,
        "max_new_tokens": 4,
        "temperature": 0.0,
    }
    run_at_once(*[("precompute", {"cache": str(cache), **options})] * 2)
    again = precompute(cache=cache, **options)
    assert (again.scored, again.sampled, again.reused) == (0, 0, 4)
    local = tmp_path / "cache"
    precompute(cache=local, **options)
    assert contents(cache) == contents(local)
    assert not list((cache / "scorings" / again.scoring / "pending").glob("*"))

    report = distill("adpa", str(models.student), cache, tmp_path / "student", **BRIEF)
    same = distill("adpa", str(models.student), local, tmp_path / "same", **BRIEF)
    assert report.last_loss == pytest.approx(same.last_loss, abs=1e-5)
    assert len(inspect_cache(cache, response_set="sampled", count=1).responses) == 1


@pytest.fixture
def read_only(filled: Filled, tmp_path: Path) -> Iterator[Path]:
    """The filled cache as a mount that nobody can write to."""
    mount = tmp_path / "mount"
    mount.mkdir()
    for command in (["--bind", str(filled.cache), str(mount)], ["-o", "remount,bind,ro", str(mount)]):
        done = subprocess.run(["mount", *command], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"mount {' '.join(command)}: {done.stderr.strip()}")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_read_only_mount_works_for_students_and_inspection(filled: Filled, read_only: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Read-only file system"):
        (read_only / "new").touch()
    report = distill("dckd", str(filled.models.student), read_only, tmp_path / "student", **BRIEF)
    assert report.steps == 2
    assert len(inspect_cache(read_only, response_set="chosen").responses) == 3
    with pytest.raises(OptionError, match=f"--cache {read_only}: it cannot be written"):
        precompute(teacher=str(filled.models.teacher), data=str(filled.data), cache=read_only)
