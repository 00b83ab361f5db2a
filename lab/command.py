"""Runs ``adpa`` as a user would type it."""

import shlex
import subprocess
import sys


def adpa(*words: object) -> None:
    """Prints a command and runs it; a command that fails ends the programme with its exit code."""
    command = [str(word) for word in words]
    print(f"\n$ adpa {shlex.join(command)}", flush=True)
    finished = subprocess.run([sys.executable, "-m", "adpa", *command], check=False)
    if finished.returncode:
        sys.exit(finished.returncode)
