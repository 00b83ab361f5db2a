"""Both stages of advantage-guided distillation on a small laboratory, without network: ``make demo``.

Trains the laboratory's teacher, reference and student, distils the student by the commands that a user would
type, and compares what came out by the laboratory's reward.
"""

import argparse
import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import logging as transformers_logging

from adpa.data.bootstrap import win_share
from adpa.errors import OptionError
from adpa.lab.checkpoints import Laboratory, build_laboratory
from adpa.lab.command import adpa
from adpa.lab.environment import Environment
from adpa.lab.evaluate import Evaluation, evaluate, mean

EVALUATION_PROMPTS = 500
BASELINE = "SFT student"
SCORING = ("--top-k", "16", "--engine", "hf")
SAMPLING = ("--max-new-tokens", "20")
TRAINING = ("--batch-size", "64", "--micro-batch-size", "64", "--learning-rate", "3e-3")
DCKD = (*TRAINING, "--num-train-epochs", "5")
ADPA = (*TRAINING, "--num-train-epochs", "3", "--advantage-weight", "1.0")

# by model, by way of decoding, `reward` and `win_rate`
Results = dict[str, dict[str, dict[str, float]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m adpa.lab.demo")
    parser.add_argument("--output", type=Path, default=Path("demo-run"), help="directory; a former demo is replaced")
    parser.add_argument("--seed", type=int, default=0, help="everything follows from it")
    arguments = parser.parse_args()
    # One thread: models this small gain nothing from a second, and lose much where cores are shared.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    transformers_logging.set_verbosity_error()
    try:
        run_demo(arguments.output, arguments.seed)
    except OptionError as error:
        print(f"adpa.lab.demo: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def run_demo(output: Path, seed: int) -> None:
    make_room(output)
    laboratory = build_laboratory(output / "lab", seed)
    checkpoints = {
        "teacher": laboratory.teacher,
        BASELINE: laboratory.student,
        **distil(laboratory, output, seed),
    }
    prompts = Environment().evaluation_prompts(EVALUATION_PROMPTS, seed)
    evaluations = {name: evaluate(path, prompts, seed) for name, path in checkpoints.items()}
    results = summarize(evaluations)
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    _print_results(results, output)


def distil(laboratory: Laboratory, output: Path, seed: int) -> dict[str, Path]:
    """The three ways from the student to a better one; returns where each lies."""
    runs = output / "runs"
    dckd = runs / "dckd"
    cache = ("--cache", output / "cache")
    data = ("--data", laboratory.preferences, *cache, *SCORING)
    teacher = ("--teacher", laboratory.teacher)
    both = (*teacher, "--reference", laboratory.reference)
    student = ("--student", laboratory.student)
    seeded = ("--seed", seed)

    adpa("precompute", *teacher, *data)
    adpa("distill", "--objective", "dckd", *student, *cache, "--output", dckd, *DCKD, *seeded)

    adpa("precompute", *both, *student, *data, *SAMPLING, *seeded)
    adpa("distill", "--objective", "adpa", *student, *cache, "--output", runs / "adpa", *ADPA, *seeded)

    student = ("--student", dckd)
    adpa("precompute", *both, *student, *data, *SAMPLING, *seeded)
    adpa("distill", "--objective", "adpa", *student, *cache, "--output", runs / "adpa-plus", *ADPA, *seeded)
    return {"DCKD": dckd, "ADPA": runs / "adpa", "ADPA+": runs / "adpa-plus"}


def make_room(output: Path) -> None:
    """An empty directory for the demo, where a former demo or nothing was."""
    if output.exists() and not (output / "lab").is_dir():
        raise OptionError(f"--output {output}: exists and is not a former demo", "name another directory")
    shutil.rmtree(output, ignore_errors=True)
    (output / "runs").mkdir(parents=True)


def summarize(evaluations: dict[str, Evaluation]) -> Results:
    """Mean reward and win rate against the SFT student, by model and by way of decoding."""
    baseline = asdict(evaluations[BASELINE])
    return {
        name: {
            decoding: {"reward": mean(rewards), "win_rate": float(win_share(rewards, baseline[decoding]).mean())}
            for decoding, rewards in asdict(evaluation).items()
        }
        for name, evaluation in evaluations.items()
    }


def _print_results(results: Results, output: Path) -> None:
    table = Table(title=f"{EVALUATION_PROMPTS} held-out prompts, win rate against the {BASELINE}")
    table.add_column("model")
    for decoding in ("sampled", "greedy"):
        table.add_column(f"{decoding}\nreward", justify="right")
        table.add_column(f"{decoding}\nwin rate", justify="right")
    for name, by_decoding in results.items():
        table.add_row(name, *(f"{value:.3f}" for scores in by_decoding.values() for value in scores.values()))
    console = Console(highlight=False)
    console.print()
    console.print(table)
    console.print(f"checkpoints: {output}/lab, {output}/runs; these numbers: {output}/results.json")


if __name__ == "__main__":
    main()
