"""How long every command takes to show its help, and to tell of a mistake: ``make bench``. Each is a process."""

import statistics
import subprocess
import sys
import time
from typing import Any

import typer

from adpa import cli

ROUNDS = 7
MISTAKES = (["precompute", "--techer", "x"], ["distill"])  # an option that does not exist; options that are missing


def main() -> None:
    """Prints a Markdown table of seconds; a round runs every command line once."""
    lines = [*([*name, "--help"] for name in commands()), *MISTAKES]
    rounds = [[seconds(*line) for line in lines] for _ in range(ROUNDS)]
    print(f"| of {ROUNDS} runs, seconds | minimum | median |\n| --- | --: | --: |")
    for line, times in zip(lines, zip(*rounds, strict=True), strict=True):
        print(f"| `{' '.join(['adpa', *line])}` | {min(times):.2f} | {statistics.median(times):.2f} |")


def commands() -> list[list[str]]:
    """The words of every command; the first is ``adpa`` alone."""
    app: Any = typer.main.get_command(cli.app)
    words = [[]] + [[name] for name in app.commands]
    return words + [[name, sub] for name, group in app.commands.items() for sub in getattr(group, "commands", ())]


def seconds(*arguments: str) -> float:
    """Wall-clock time of one run of ``adpa``."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "adpa", *arguments], check=False, capture_output=True)
    taken = time.perf_counter() - started
    assert done.returncode == (0 if "--help" in arguments else 2), done.stderr
    return taken


if __name__ == "__main__":
    main()
