"""A process that does the runs of one seed, ends when the process that started it does, and says why it failed."""

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
    """Starts ``conduct_seed`` with these arguments."""

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
        """None while it works."""
        return self._process.exitcode

    def check(self) -> None:
        """Raises what the process failed with.

        Raises:
            AdpaError: what it raised.
            RuntimeError: it failed in another way; its log says how.
        """
        if self.exitcode == 0:
            return
        try:
            raise self._errors.recv()
        except EOFError:
            raise RuntimeError(f"seed {self.seed}: its process ended with {self.exitcode}; see {self._log}") from None

    def terminate(self) -> None:
        """Stops it, wherever it is; what it was doing is done again next time."""
        self._process.terminate()

    def join(self) -> None:
        """Waits until it has ended."""
        self._process.join()


def _work(errors: Connection, directory: Path, seed: int, plan: Plan, prompts: int, runs: Sequence[Run]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to us too; our parent decides
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
