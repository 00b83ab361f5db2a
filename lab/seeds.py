"""The runs of a study on all its seeds, each seed in a process of its own, and the options that they choose."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing import connection
from pathlib import Path

from adpa.lab.evaluate import mean
from adpa.lab.methods import Method, trial_name
from adpa.lab.runs import Run, has_result, read_result
from adpa.lab.seed_process import SeedProcess
from adpa.lab.study import Study
from adpa.progress import progress


def tune(output: Path, study: Study, workers: int) -> dict[str, Method]:
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
        conduct_seeds(
            "trials", output, study, study.tuning_seeds, [run for runs in trials.values() for run in runs], workers
        )
        best |= {name: max(runs, key=reward) for name, runs in trials.items()}
    return {name: best[name].method or method if name in best else method for name, method in study.methods.items()}


def conduct_seeds(
    what: str, output: Path, study: Study, seeds: Sequence[int], runs: Sequence[Run], workers: int
) -> None:
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
