"""The commands of adpa for the tests: their functions, their options, and one as a process."""

import inspect
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import typer

from adpa import (
    cli,
    collect_garbage,
    distill,
    evaluate,
    export_cache,
    inspect_cache,
    list_cache,
    list_runs,
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
    "runs": list_runs,
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


class Answer(NamedTuple):
    """What a command answers."""

    exit_code: int
    stdout: str
    stderr: str


def run_light(commands: Iterable[str], folder: Path) -> list[Answer]:
    """What each of some commands answers; all run in one process, and none may import a slow package."""
    program = (
        "import json, shlex, sys; from typer.testing import CliRunner; from adpa import cli; said = []\n"
        "for words in json.load(sys.stdin):\n"
        "    done = CliRunner().invoke(cli.app, shlex.split(words), prog_name='adpa')\n"
        "    said.append([done.exit_code, done.stdout, done.stderr])\n"
        "    slow = {'torch', 'transformers', 'datasets'} & sys.modules.keys()\n"
        "    if slow: sys.exit(f'{words}: imports {slow}')\n"
        "print(json.dumps(said))"
    )
    command, asked = [sys.executable, "-c", program], json.dumps(list(commands))
    done = subprocess.run(command, cwd=folder, input=asked, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return [Answer(*answer) for answer in json.loads(done.stdout)]


def refusals(commands: Iterable[str], folder: Path) -> list[str]:
    """What each of some commands says on standard error where it is refused: exit code 2, no slow package imported."""
    answers = run_light(commands, folder)
    assert {(answer.exit_code, answer.stdout) for answer in answers} <= {(2, "")}
    return [answer.stderr for answer in answers]
