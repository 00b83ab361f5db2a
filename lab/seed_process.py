"""Runs one seed of a study in a process of its own, which reports its errors and ends with its parent."""

import os
import signal
import threading
from collections.abc import Sequence
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection
from pathlib import Path

from adpa.errors import AdpaError
from adpa.lab.checkpoints import Plan
from adpa.lab.runs import Run, conduct_seed


class SeedProcess:
    """A process that runs ``conduct_seed`` with these arguments."""

    def __init__(self, directory: Path, seed: int, plan: Plan, prompts: int, runs: Sequence[Run]) -> None:
        self.seed = seed
        self._log = directory / f"seed-{seed}" / "log.txt"
        context = get_context("spawn")
        self._errors, errors = context.Pipe(duplex=False)
        self._process = context.Process(target=_work, args=(errors, directory, seed, plan, prompts, runs), daemon=True)
        self._process.start()
        errors.close()

    @property
    def sentinel(self) -> int:
        """Ready when the process has ended."""
        return self._process.sentinel

    @property
    def exitcode(self) -> int | None:
        """The exit code; None while the process runs."""
        return self._process.exitcode

    def check(self) -> None:
        """Raises the error of a failed process.

        Raises:
            AdpaError: the process raised it.
            RuntimeError: the process failed in another way; see its log.
        """
        if self.exitcode == 0:
            return
        try:
            raise self._errors.recv()
        except EOFError:
            raise RuntimeError(f"seed {self.seed}: its process ended with {self.exitcode}; see {self._log}") from None

    def terminate(self) -> None:
        """Stops the process at once. The next run of the study repeats its open run."""
        self._process.terminate()

    def join(self) -> None:
        """Waits until the process has ended."""
        self._process.join()


def _work(errors: Connection, directory: Path, seed: int, plan: Plan, prompts: int, runs: Sequence[Run]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal also sends it to this process; the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        conduct_seed(directory, seed, plan, prompts, runs)
    except AdpaError as error:
        errors.send(type(error)(f"seed {seed}: {error}"))
        raise


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
