"""``adpa lab``: conducts a study, seed by seed, and reports it."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from filelock import FileLock, Timeout
from typing_extensions import Doc

from adpa.data.cache.files import write_file
from adpa.data.cache.kinds import kind
from adpa.data.cache.locations import check_writable
from adpa.data.cache.signals import SignalTable, read_scorings, read_signals
from adpa.errors import OptionError
from adpa.lab.seed_list import check_seeds
from adpa.pipeline.option_checks import COUNT
from adpa.pipeline.options import Group
from adpa.yaml_options import read_options

if TYPE_CHECKING:
    from adpa.lab.report import StudyReport
    from adpa.lab.study import Study

SETTINGS = "study.json"


def lab(
    output: Annotated[
        Path, Doc("Directory of the study; one that was begun with the same settings is finished."), Group.DECIDE
    ],
    study: Annotated[
        Path | None, Doc("YAML file of seeds, methods and settings; default: the laboratory's own study."), Group.DECIDE
    ] = None,
    seed: Annotated[list[int] | None, Doc("Seed to report, instead of the study's; repeatable."), Group.DECIDE] = None,
    workers: Annotated[int, Doc("Seeds that are worked on at a time, each on one core."), Group.SCALE] = 2,
) -> "StudyReport":
    """Measure the methods where a formula computes the preferences: no judge, no network.

    For every seed a teacher pair and a student are trained from scratch, the student is trained on by every method of
    the study, each through adpa precompute and adpa distill, and what the students say is scored by the formula.

    Raises:
        AdpaError: a problem with the arguments, the study or the directory that the caller can solve.
    """
    started = time.perf_counter()
    COUNT.check("--workers", workers)
    if seed:
        check_seeds(seed, "--seed")
    if study is not None:
        read_options("--study", study)
    _check_directory(output)
    if find_spec("trl") is None:
        raise OptionError("adpa lab needs trl, which is not installed", "pip install 'adpa[lab]'")

    # These import torch and transformers, which takes seconds: --help and a wrong value should not wait for them.
    from adpa.lab.plots import plot_study
    from adpa.lab.report import report_study
    from adpa.lab.runs import STUDENT, TEACHER, Run, read_result
    from adpa.lab.seeds import conduct_seeds, tune
    from adpa.lab.study import OWN_STUDY, read_study

    chosen = read_study(study or OWN_STUDY, seed)
    _begin(output, chosen)
    with _alone(output):
        tuned = tune(output, chosen, workers)
        runs = [Run(name, method, method.after) for name, method in {**tuned, **chosen.variants}.items()]
        runs = [STUDENT, TEACHER, *sorted(runs, key=lambda run: run.start is not None)]
        conduct_seeds("students", output, chosen, chosen.seeds, runs, workers)
        results = [read_result(output, each, run) for each in chosen.seeds for run in runs]
        report = report_study(output, tuned, chosen.variants, results, time.perf_counter() - started)
        plot_study(output, report, _signals(output, chosen.seeds[0]))
        return report


def _check_directory(output: Path) -> None:
    """Checks that a study can be begun in a directory, or has been."""
    check_writable("--output", output)
    if output.exists() and any(output.iterdir()) and not (output / SETTINGS).exists():
        what = kind(output) if kind(output) != "a directory" else "not empty"
        raise OptionError(f"--output {output}: {what}, and no study", "name another directory")


def _begin(output: Path, study: "Study") -> None:
    """Writes down a study's settings and adpa's version in its directory, or checks that it was begun with these."""
    path = output / SETTINGS
    settings = json.loads(json.dumps(study.settings() | {"adpa": version("adpa")}))
    if path.exists():
        try:
            begun = json.loads(path.read_text())
        except ValueError as error:
            raise OptionError(f"{path}: damaged: {error}", "delete it if the study beside it is this one") from error
        different = [name for name, value in settings.items() if begun.get(name) != value]
        if different == ["adpa"]:
            other = f"adpa {begun['adpa']}" if "adpa" in begun else "an adpa that did not write down its version"
            raise OptionError(
                f"--output {output}: the study there was begun by {other}; this is adpa {settings['adpa']}",
                "name another directory, so that all results are of one version",
            )
        if different:
            raise OptionError(
                f"--output {output}: a study of other settings was begun there: its {' and '.join(different)} differ",
                "name another directory",
            )
    else:
        output.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(settings, indent=2).encode())


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """While no other process works in the directory."""
    try:
        with FileLock(output / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise OptionError(f"--output {output}: another adpa lab is working there", "wait for it, or stop it") from error


def _signals(output: Path, seed: int) -> SignalTable:
    """What the teacher and its reference said on one seed."""
    cache = output / f"seed-{seed}" / "cache"
    scorings = [one for one in read_scorings(cache) if one.reference is not None and one.engine == "hf"]
    return max((read_signals(cache, one) for one in scorings), key=len, default=SignalTable([]))
