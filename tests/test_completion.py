"""Completion of the command line by a shell."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from adpa import cli

ADPA = Path(sys.executable).with_name("adpa")


def complete(line: str) -> list[str]:
    """What a shell offers for the last word of a line."""
    asked = {"_ADPA_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    return CliRunner().invoke(cli.app, [], env=asked, prog_name="adpa").output.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("adpa pre", ["precompute"]),
        ("adpa cache ", ["ls", "verify", "gc", "pack", "export", "merge"]),
        ("adpa precompute --te", ["--teacher", "--temperature", "--tensor-parallel"]),
        ("adpa distill --objective ", ["sft", "kd", "dckd", "adpa"]),
        ("adpa distill --objective d", ["dckd"]),
        ("adpa precompute --top-k x --engine v", ["vllm"]),
        ("adpa distill --config missing.yaml --obj", ["--objective"]),
    ],
)
def test_commands_options_and_choices_are_offered(line: str, offered: list[str]) -> None:
    assert complete(line) == offered


@pytest.mark.parametrize("line", ["adpa distill --student ", "adpa cache ls ", "adpa precompute --data ./"])
def test_paths_are_left_to_the_shell(line: str) -> None:
    assert complete(line) == []


def test_a_command_that_does_not_exist_has_nothing_to_offer() -> None:
    assert complete("adpa distil --obj") == []


def test_bash_completes_with_the_script_that_adpa_prints() -> None:
    script = f"""
        source <({ADPA} --show-completion bash)
        COMP_WORDS=(adpa distill --object); COMP_CWORD=2
        _adpa_completion {ADPA}; echo "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["--objective"], done.stderr


def test_the_help_says_how_to_install_it() -> None:
    help_text = CliRunner().invoke(cli.app, ["--help"]).output
    assert "--install-completion" in help_text
    assert "<bool>" not in help_text
