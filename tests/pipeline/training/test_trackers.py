"""``--report-to``: trackers of transformers that are installed, or one line."""

from pathlib import Path
from typing import Any

import pytest
from tests.pipeline.conftest import Filled
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from adpa import distill
from adpa.errors import OptionError
from adpa.pipeline.training.trackers import ALL, NONE, TRACKERS, read_trackers


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The packages that are installed; none at first."""
    packages: list[str] = []
    found = "adpa.pipeline.training.trackers.find_spec"
    monkeypatch.setattr(found, lambda name: object() if name in packages else None)
    return packages


def test_the_trackers_are_those_of_transformers() -> None:
    assert TRACKERS.keys() == INTEGRATION_TO_CALLBACK.keys()
    assert list(TRACKERS) == sorted(TRACKERS)


@pytest.mark.parametrize(
    ("report_to", "line"),
    [
        ("wandbb", "--report-to wandbb: no tracker 'wandbb'; did you mean wandb?"),
        ("wandb,tensorbord", "--report-to wandb,tensorbord: no tracker 'tensorbord'; did you mean tensorboard?"),
        (
            "zzz",
            f"--report-to zzz: no tracker 'zzz'; expected some of {', '.join((NONE, ALL, *TRACKERS))}",
        ),
        ("wandb,mlflow", "--report-to mlflow needs mlflow, which is not installed; pip install mlflow"),
        ("Dagshub", "--report-to dagshub needs dagshub, which is not installed; pip install dagshub mlflow"),
        ("comet_ml", "--report-to comet_ml needs comet-ml, which is not installed; pip install comet-ml"),
        ("none,wandb", "--report-to none,wandb: none beside others; leave none out, or name it alone"),
        ("wandb,all", "--report-to wandb,all: all beside others; leave all out, or name it alone"),
    ],
)
def test_a_tracker_that_cannot_be_used_is_refused(report_to: str, line: str, installed: list[str]) -> None:
    installed.append("wandb")
    with pytest.raises(OptionError) as caught:
        read_trackers(report_to)
    assert str(caught.value) == line


@pytest.mark.parametrize(
    ("report_to", "names"),
    [
        ("none", []),
        ("all", ["all"]),
        ("WandB, tensorboard,wandb", ["wandb", "tensorboard"]),
        ("kubeflow", ["kubeflow"]),
    ],
)
def test_trackers_are_named_with_commas_between_them(report_to: str, names: list[str], installed: list[str]) -> None:
    installed += ["wandb", "tensorboardX"]
    assert read_trackers(report_to) == names


class NoLogin(TrainerCallback):
    """A tracker of somebody who has not logged in."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        raise ConnectionRefusedError("No API key configured.\nUse login().")


class NotWhole(TrainerCallback):
    """A tracker whose package is there in part."""

    def __init__(self) -> None:
        raise RuntimeError("It needs its package.\nInstall it.")


@pytest.mark.parametrize(
    ("tracker", "line"),
    [
        (
            NoLogin,
            "--report-to wandb: it does not start: No API key configured. Use login().; log in, or leave it out",
        ),
        (NotWhole, "--report-to: It needs its package. Install it"),
    ],
)
def test_a_tracker_that_does_not_start_is_one_line(
    tracker: type, line: str, installed: list[str], few_words: Filled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed.append("wandb")
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "wandb", tracker)
    with pytest.raises(OptionError) as caught:
        distill("sft", str(few_words.models.student), few_words.cache, tmp_path, report_to="wandb", max_steps=1)
    assert str(caught.value) == line
