"""The commands of adpa for the tests: their functions, their options, and one as a process."""

import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from adpa import (
    cli,
    collect_garbage,
    distill,
    evaluate,
    export_cache,
    inspect_cache,
    list_cache,
    merge_cache,
    pack_cache,
    precompute,
    verify_cache,
)
from adpa.lab.conduct import lab
from adpa.parameters import doc_of
from adpa.parser import load

COMMANDS: dict[str, Callable[..., Any]] = {
    "precompute": precompute,
    "distill": distill,
    "evaluate": evaluate,
    "inspect": inspect_cache,
    "lab": lab,
    "cache ls": list_cache,
    "cache verify": verify_cache,
    "cache gc": collect_garbage,
    "cache pack": pack_cache,
    "cache export": export_cache,
    "cache merge": merge_cache,
}


def parameters_of(command: str) -> dict[str, inspect.Parameter]:
    """The parameters of a command's function that are options: those with a ``Doc``."""
    return {name: each for name, each in inspect.signature(COMMANDS[command]).parameters.items() if doc_of(each)}


def registered_as(command: str) -> Any:
    """A command as its group lists it."""
    registered: Any = typer.main.get_command(cli.app)
    for part in command.split():
        registered = registered.commands[part]
    return registered


def options_of(command: str) -> dict[str, Any]:
    """The parameters of a command as the parser has them, in the order of its help."""
    return {parameter.name: parameter for parameter in load(registered_as(command)).params}


def adpa(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "adpa", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
