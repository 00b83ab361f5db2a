"""Runs ``adpa`` commands as a user would type them."""

import shlex
import subprocess
import sys


def adpa(*words: object) -> None:
    """Prints a command and runs it. If it fails, the program ends with its exit code."""
    command = [str(word) for word in words]
    print(f"\n$ adpa {shlex.join(command)}", flush=True)
    finished = subprocess.run([sys.executable, "-m", "adpa", *command], check=False)
    if finished.returncode:
        sys.exit(finished.returncode)
