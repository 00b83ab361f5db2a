"""Runs commands of adpa, each in a fork of one process that has imported the command line: quick, and apart.

Reads a JSON list of [working directory, words]; writes a JSON list of [exit code, stdout, stderr, slow modules]: those
that the command imported.
"""

import json
import os
import sys
import tempfile

from adpa import cli

SLOW = {"torch", "transformers", "datasets", "vllm"}


def run(folder: str, words: list[str]) -> tuple[int, str, str, list[str]]:
    """Runs one command in a child."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err, tempfile.TemporaryFile("w+") as slow:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            os.chdir(folder)
            sys.argv = ["adpa", *words]
            code: object = 70
            try:
                cli.main()
            except SystemExit as stop:
                code = stop.code
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                json.dump(sorted(SLOW & sys.modules.keys()), slow)
                slow.flush()
                os._exit(code if isinstance(code, int) else 0 if code is None else 1)
        exit_code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for written in (out, err, slow):
            written.seek(0)
        return exit_code, out.read(), err.read(), json.loads(slow.read() or "[]")


if __name__ == "__main__":
    json.dump([run(*each) for each in json.load(sys.stdin)], sys.stdout)
