"""How long every command takes to show its help, as a process of its own: ``make bench``."""

import statistics
import subprocess
import sys
import time
from typing import Any

import typer

from adpa import cli

ROUNDS = 7


def main() -> None:
    """Prints a Markdown table of seconds; a round runs every command once."""
    names = commands()
    rounds = [[seconds(*name, "--help") for name in names] for _ in range(ROUNDS)]
    print(f"| of {ROUNDS} runs, seconds | minimum | median |\n| --- | --: | --: |")
    for name, times in zip(names, zip(*rounds, strict=True), strict=True):
        print(f"| `{' '.join(['adpa', *name, '--help'])}` | {min(times):.2f} | {statistics.median(times):.2f} |")


def commands() -> list[list[str]]:
    """The words of every command; the first is ``adpa`` alone."""
    app: Any = typer.main.get_command(cli.app)
    words = [[]] + [[name] for name in app.commands]
    return words + [[name, sub] for name, group in app.commands.items() for sub in getattr(group, "commands", ())]


def seconds(*arguments: str) -> float:
    """Wall-clock time of one run of ``adpa``."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "adpa", *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
