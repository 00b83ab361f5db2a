"""Options of the executor: which combinations are refused before anything starts."""

import sys
from pathlib import Path
from typing import Any

import pytest
from tests.pipeline.conftest import Filled

from adpa import precompute
from adpa.errors import OptionError
from adpa.pipeline.scoring.executor import ExecutorOptions

CPU, SECOND_GPU = "cpu", "cuda:1"


@pytest.mark.parametrize(
    ("options", "device", "message"),
    [
        (ExecutorOptions(workers=2), CPU, "--workers 2 without --executor ray"),
        (ExecutorOptions(ray_address="auto"), CPU, "--ray-address auto without --executor ray"),
        (ExecutorOptions("ray"), CPU, "--executor ray without --workers"),
        (ExecutorOptions("ray", 0), CPU, "--workers 0; expected at least 1"),
        (ExecutorOptions("ray", 2), SECOND_GPU, "--device cuda:1: Ray gives every worker its own GPU"),
        (ExecutorOptions("ray", 2, "head"), CPU, "--ray-address head; expected auto or host:port"),
    ],
)
def test_options_without_meaning_are_refused(options: ExecutorOptions, device: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        options.check(device)


def test_without_ray_it_is_said_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "adpa.pipeline.scoring.ray_executor", raising=False)
    with pytest.raises(OptionError, match=r"pip install 'adpa\[ray\]'"):
        ExecutorOptions("ray", 2).check(CPU)
    ExecutorOptions().check(CPU)


def test_more_workers_than_batches_are_refused_by_the_whole_work_and_not_by_what_is_missing(
    few_words: Filled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished command can be run again. Then no work is left, and Ray does not start."""
    monkeypatch.setattr("adpa.pipeline.scoring.ray_executor._join", lambda _: pytest.fail("Ray was started"))
    options: dict[str, Any] = {
        "teacher": str(few_words.models.teacher),
        "reference": str(few_words.models.reference),
        "data": str(few_words.data),
        "cache": few_words.cache,
        "top_k": 10,
        "executor": "ray",
    }
    with pytest.raises(OptionError, match="--workers 2: the work has 1 batches at most; lower --workers, or"):
        precompute(**options, workers=2)
    done = precompute(**options, workers=2, batch_tokens=60)
    assert (done.scored, done.reused, done.workers) == (0, 16, 2)


def test_ranks_do_not_all_do_the_same_work(filled: Filled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(OptionError, match="2 ranks would all do the same work; use --executor ray"):
        precompute(str(filled.models.teacher), str(filled.data), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
