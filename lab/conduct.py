"""``adpa lab``: conducts a study, seed by seed, and reports it."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import connection
from pathlib import Path
from typing import Annotated

from filelock import FileLock, Timeout
from typing_extensions import Doc

from adpa.data.cache.files import write_file
from adpa.data.cache.locations import check_writable
from adpa.data.cache.signals import SignalTable, read_scorings, read_signals
from adpa.errors import OptionError
from adpa.lab.evaluate import mean
from adpa.lab.methods import Method, trial_name
from adpa.lab.report import StudyReport, report_study
from adpa.lab.runs import STUDENT, TEACHER, Run, has_result, read_result
from adpa.lab.seed_process import SeedProcess
from adpa.lab.study import OWN_STUDY, Study, read_study
from adpa.progress import progress

SETTINGS = "study.json"


def lab(
    output: Annotated[Path, Doc("Directory of the study; one that was begun with the same settings is finished.")],
    study: Annotated[
        Path | None, Doc("YAML file of seeds, methods and settings; default: the laboratory's own study.")
    ] = None,
    seed: Annotated[list[int] | None, Doc("Seed to report, instead of the study's; repeatable.")] = None,
    workers: Annotated[int, Doc("Seeds that are worked on at a time, each on one core.")] = 2,
) -> StudyReport:
    """Measure the methods where a formula computes the preferences: no judge, no network.

    For every seed a teacher pair and a student are trained from scratch, the student is trained on by every method of
    the study, each through adpa precompute and adpa distill, and what the students say is scored by the formula.

    Raises:
        AdpaError: something about the arguments, the study or the directory that the caller can put right.
    """
    started = time.perf_counter()
    chosen = read_study(study or OWN_STUDY, seed)
    for package in ("trl", "matplotlib"):
        if find_spec(package) is None:
            raise OptionError(f"adpa lab needs {package}, which is not installed", "pip install 'adpa[lab]'")
    if workers < 1:
        raise OptionError(f"--workers {workers}; expected at least 1")
    check_writable("--output", output)
    _begin(output, chosen)
    with _alone(output):
        tuned = _tune(output, chosen, workers)
        methods = {**tuned, **chosen.variants}
        runs = [
            STUDENT,
            TEACHER,
            *(Run(name, method, method.after) for name, method in methods.items() if method.after is None),
            *(Run(name, method, method.after) for name, method in methods.items() if method.after is not None),
        ]
        _conduct("students", output, chosen, chosen.seeds, runs, workers)
        results = [read_result(output, each, run) for each in chosen.seeds for run in runs]
        report = report_study(output, tuned, chosen.variants, results, time.perf_counter() - started)
        from adpa.lab.plots import plot_study  # matplotlib: only this command needs it

        plot_study(output, report, _signals(output, chosen.seeds[0]))
        return report


def _begin(output: Path, study: Study) -> None:
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
            found = f"adpa {begun['adpa']}" if "adpa" in begun else "an adpa that did not write down its version"
            raise OptionError(
                f"--output {output}: the study there was begun by {found}; this is adpa {settings['adpa']}",
                "name another directory, so that all results are of one version",
            )
        if different:
            raise OptionError(
                f"--output {output}: a study of other settings was begun there: its {' and '.join(different)} differ",
                "name another directory",
            )
    elif output.exists() and any(output.iterdir()):
        raise OptionError(f"--output {output}: not empty, and no study", "name another directory")
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


def _tune(output: Path, study: Study, workers: int) -> dict[str, Method]:
    """The methods, with the options of the trial whose students had the highest mean sampled reward.

    A method that comes after another one is tuned on the students of that one's best trial.
    """
    tuned = {name for name, method in study.methods.items() if method.trials}
    tuned |= {method.after for name, method in study.methods.items() if name in tuned and method.after}
    best: dict[str, Run] = {}

    def trials_of(name: str, method: Method) -> list[Run]:
        start = best[method.after].name if method.after else None
        options = [{**method.options, **trial} for trial in method.trials or ({},)]
        return [Run(trial_name(name, n), replace(method, options=one), start) for n, one in enumerate(options, start=1)]

    def reward(run: Run) -> float:
        return mean([mean(read_result(output, seed, run).evaluation.sampled) for seed in study.tuning_seeds])

    for comes_after in (False, True):
        trials = {
            name: trials_of(name, method)
            for name, method in study.methods.items()
            if name in tuned and (method.after is not None) == comes_after
        }
        _conduct(
            "trials", output, study, study.tuning_seeds, [run for runs in trials.values() for run in runs], workers
        )
        best |= {name: max(runs, key=reward) for name, runs in trials.items()}
    return {name: best[name].method or method if name in best else method for name, method in study.methods.items()}


def _signals(output: Path, seed: int) -> SignalTable:
    """What the teacher and its reference said on one seed."""
    cache = output / f"seed-{seed}" / "cache"
    scorings = [found for found in read_scorings(cache) if found.reference is not None and found.engine == "hf"]
    return max((read_signals(cache, found) for found in scorings), key=len, default=SignalTable([]))


def _conduct(what: str, output: Path, study: Study, seeds: Sequence[int], runs: Sequence[Run], workers: int) -> None:
    """Does the runs of all seeds, each seed in a process of its own, some at a time, and shows progress."""

    def done() -> int:
        return sum(has_result(output, seed, run) for seed in seeds for run in runs)

    waiting = [seed for seed in seeds if not all(has_result(output, seed, run) for run in runs)]
    working: list[SeedProcess] = []
    shown = done()
    with progress(what, len(seeds) * len(runs) - shown) as advance:
        try:
            while waiting or working:
                while waiting and len(working) < workers:
                    working.append(SeedProcess(output, waiting.pop(0), study.plan, study.prompts, runs))
                connection.wait([one.sentinel for one in working], timeout=1)
                advance(done() - shown)
                shown = done()
                for ended in [one for one in working if one.exitcode is not None]:
                    working.remove(ended)
                    ended.check()
                    print(f"{what} of seed {ended.seed}: done", file=sys.stderr, flush=True)
        finally:
            for one in working:
                one.terminate()
                one.join()
