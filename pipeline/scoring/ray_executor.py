"""Runs the jobs of stage one on a Ray cluster: Ray Data over a pool of workers, each with its own model.

A worker receives token ids, in blocks of batches, and writes its own shards into the cache. If a worker dies, Ray runs
its block again. The second worker writes files with the same names and bytes as the first one did. A block that kills
several workers ends the run.
"""

import logging
import os
import pickle
import platform
import re
import signal
import socket
import subprocess
import sys
import threading
import traceback
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import ray
import ray.data
import ray.exceptions

from adpa.data.cache.files import remove_file, write_file
from adpa.data.cache.locations import Location
from adpa.errors import CacheError, EngineError, OptionError, first_line
from adpa.pipeline.scoring.jobs import Job, write_batches
from adpa.progress import progress

Item = TypeVar("Item")
Result = TypeVar("Result")

warnings = logging.getLogger(__name__)

CONNECT_SECONDS = 5  # for a cluster to accept a connection
ADVICE = (
    "run adpa on a machine of the cluster, check it with ray status; a cluster with a token wants RAY_AUTH_MODE=token"
)
TRY_TO_JOIN = """
import sys
sys.path = [folder for folder in sys.path if folder]  # without the working directory: its files are no modules
import ray
try:
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
except Exception as error:
    sys.exit(print(str(error).partition("\\n")[0]) or 1)
"""
TRIES = 3  # for the same block, if workers die
BATCHES_PER_BLOCK = 32  # at most: a dead worker loses its block


def check_address(address: str) -> None:
    """Checks, without waiting long, that a cluster answers at an address and that this machine belongs to it.

    Raises:
        OptionError: the address is not valid, no cluster answers, or this process is in a cluster already.
    """
    problem = f"--ray-address {address}"
    if address == "auto" and "RAY_ADDRESS" in os.environ:
        problem += f", where RAY_ADDRESS is {os.environ['RAY_ADDRESS']}"
    if ray.is_initialized():
        raise OptionError(f"{problem}: this process is in a Ray cluster already", "leave it out")
    if address != "auto":
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit() or "/" in host:
            raise OptionError(f"{problem}; expected auto or host:port", ADVICE)
        try:
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise OptionError(f"{problem}: it does not answer: {error}", ADVICE) from error
    try:  # if no Ray listens at the port, ray.init would wait for minutes
        command = [sys.executable, "-c", TRY_TO_JOIN, address]
        tried = subprocess.run(command, capture_output=True, timeout=4 * CONNECT_SECONDS, check=False)
        failed, output = tried.returncode != 0, tried.stdout
    except subprocess.TimeoutExpired as late:
        failed, output = True, late.stderr or b""
    if failed:
        reason = output.decode(errors="replace").strip().rpartition("\n")[2].rpartition("] ")[2]
        reason = re.sub(r"^\w+\.(cc|h):\d+: ", "", reason)  # drops the source location in Ray's core
        raise OptionError(f"{problem}: no Ray cluster answers{': ' if reason else ''}{reason}", ADVICE)


class RayExecutor:
    """An ``Executor`` with workers on a Ray cluster. The first job joins or starts the cluster.

    Leaving its context stops everything that it started. If this process is in a cluster already, it uses that one.

    Args:
        workers: number of workers.
        address: address of a cluster; None starts one on this machine.
        gpus: GPUs of each worker, all on one machine; with 0, a worker gets its share of the CPUs.
        cache: every worker must see it under this name. A marker file proves that it does.
    """

    def __init__(self, workers: int, address: str | None, gpus: int, cache: Location) -> None:
        self._workers, self._address, self._gpus = workers, address, gpus
        self._cpus = 1
        self._marker = cache / f".workers.{uuid.uuid4().hex}"
        self._stack = ExitStack()
        self._started = False

    def __enter__(self) -> "RayExecutor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def __call__(self, job: Job[Item, Result], batches: Sequence[Sequence[Item]]) -> list[Result]:
        """See ``Executor``.

        Raises:
            AdpaError: a worker raised it; or Ray failed, or the cluster is too small, does not answer or does not see
                the cache.
        """
        self._start()
        write_file(self._marker, b"")
        blocks = _blocks(batches, self._workers)
        attempts = ray.remote(_Attempts).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote()
        rows = [{"number": number, "batches": pickle.dumps(block)} for number, block in enumerate(blocks)]
        answers = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _Worker,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(self._workers, len(blocks)), max_tasks_in_flight_per_actor=2),
            fn_constructor_args=(job, attempts, TRIES * self._workers, self._marker),
            num_cpus=self._cpus,
            num_gpus=self._gpus,
        )
        answers.context.enable_progress_bars = False
        answers.context.print_on_execution_start = False
        answers.context.execution_no_progress_timeout_s = -1  # large models take long to load
        results: list[Result] = []
        with (
            progress(job.counts, sum(job.size(item) for batch in batches for item in batch)) as advance,
            _one_display(),
        ):
            try:
                for answer in answers.iter_rows():
                    outcome: _Outcome = pickle.loads(answer["outcome"])
                    if outcome.error is not None:
                        raise outcome.error from EngineError(outcome.trace)
                    if outcome.tries > 1:
                        warnings.warning("a worker died; another one did its batches, at try %d", outcome.tries)
                    write_file(self._marker, b"")  # refreshed: a gc removes files older than a day
                    results += outcome.results
                    advance(sum(job.size(item) for batch in blocks[answer["number"]] for item in batch))
            except ray.exceptions.RayError as error:
                raise EngineError(
                    f"Ray: {type(error).__name__}: {first_line(error)}", "finished batches are kept: run it again"
                ) from error
        return results

    def _start(self) -> None:
        if self._started:
            return
        self._started = True
        starts_cluster = not ray.is_initialized() and self._address is None
        if not ray.is_initialized():
            self._stack.callback(ray.shutdown)  # also if a signal arrives during the start
            _join(self._address)
        elif self._address is not None:
            raise OptionError(
                f"--ray-address {self._address}: this process is in a Ray cluster already", "leave it out"
            )
        self._cpus = self._cpus_of_a_worker(starts_cluster)
        self._stack.callback(remove_file, self._marker)

    def _cpus_of_a_worker(self, alone: bool) -> int:
        """CPUs of each worker: the largest equal share, or 1 if the cluster also serves others or workers use GPUs."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        kind, each = ("GPU", self._gpus) if self._gpus else ("CPU", 1)
        room = sum(min(int(node.get(kind, 0)) // each, int(node.get("CPU", 0))) for node in nodes)
        if room < self._workers:
            raise OptionError(
                f"--workers {self._workers}: the cluster has room for {room}; each takes {each} {kind} of one machine"
                + (", and a CPU" if self._gpus else ""),
                "lower --workers, or add machines",
            )
        cpus = [int(node.get("CPU", 0)) for node in nodes]
        if not alone:
            free = ray.available_resources()
            if (startable := int(free.get(kind, 0)) // each) < self._workers:
                warnings.warning(
                    "the cluster is busy: %d of %d workers can start now, the others when resources are free",
                    startable,
                    self._workers,
                )
            if free.get("CPU", 0) < sum(cpus):
                return 1
        if self._gpus:
            return 1
        return next(share for share in range(max(cpus), 0, -1) if sum(n // share for n in cpus) >= self._workers)


class _Attempts:
    """Counts the attempts at each piece of work since it was last finished."""

    def __init__(self) -> None:
        self._counts: Counter[object] = Counter()

    def begin(self, work: object) -> int:
        self._counts[work] += 1
        return self._counts[work]

    def finish(self, work: object) -> None:
        del self._counts[work]


@dataclass(frozen=True)
class _Outcome:
    """The outcome of a block: the callbacks' results, or an error with its trace; and the number of the try."""

    results: list[Any]
    error: Exception | None = None
    trace: str = ""
    tries: int = 1


class _Worker:
    """An open job in a process of its own. It returns errors as outcomes, so that users see them as without Ray."""

    def __init__(self, job: Job[Any, Any], attempts: Any, openings: int, marker: Location) -> None:
        self._job, self._attempts = job, attempts
        self._stack = ExitStack()
        self._failure: _Outcome | None = None
        try:
            if ray.get(attempts.begin.remote("open")) > openings:
                raise EngineError(
                    "several workers died while they loaded a model", "give each worker more memory, or lower --workers"
                )
            if not marker.exists():
                raise CacheError(
                    f"{marker.parent}: {platform.node()} does not see this cache",
                    "put it where all machines of the cluster see it, or into an object store",
                )
            self._process = self._stack.enter_context(job.open())
            ray.get(attempts.finish.remote("open"))
        except Exception as error:
            self._failure = _failure(error)

    def __call__(self, block: dict[str, Any]) -> dict[str, list[Any]]:
        number, batches = int(block["number"][0]), pickle.loads(block["batches"][0])
        return {"number": [number], "outcome": [pickle.dumps(self._failure or self._run(number, batches))]}

    def __del__(self) -> None:
        self._stack.close()

    def _run(self, number: int, batches: Sequence[Sequence[Any]]) -> _Outcome:
        results: list[Any] = []
        try:
            tries = ray.get(self._attempts.begin.remote(number))
            if tries > TRIES:
                raise EngineError(
                    f"{TRIES} workers died over the same batches, one after the other",
                    "if they ran out of memory, lower --batch-tokens or --workers; finished batches are kept",
                )
            write_batches("", batches, self._job.size, self._process(batches), lambda write: results.append(write()))
            ray.get(self._attempts.finish.remote(number))
        except Exception as error:
            return _failure(error)
        return _Outcome(results, tries=tries)


def _blocks(batches: Sequence[Sequence[Item]], workers: int) -> list[Sequence[Sequence[Item]]]:
    """Groups batches into blocks, each half of a worker's share of the remaining batches.

    Large blocks come first, because an engine's queue runs empty between two blocks. Small blocks come last, so that
    all workers end together.
    """
    blocks: list[Sequence[Sequence[Item]]] = []
    start = 0
    while start < len(batches):
        size = min(max((len(batches) - start) // (2 * workers), 1), BATCHES_PER_BLOCK)
        blocks.append(batches[start : start + size])
        start += size
    return blocks


def _failure(error: Exception) -> _Outcome:
    """The outcome of an error, in a form that can be pickled."""
    trace = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # the error's class may do anything
        error = EngineError(f"{type(error).__name__}: {first_line(error)}")
    return _Outcome([], error, trace)


def _join(address: str | None) -> None:
    """Joins a cluster, or starts one on this machine."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # else it warns about arguments of Ray Data
    options: dict[str, Any] = {"include_dashboard": False} if address is None else {}
    with _delayed_signals(), _silent_start():
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **options)


@contextmanager
def _delayed_signals() -> Iterator[None]:
    """Delays signals until Ray has started all its processes, and restores our handlers, some of which Ray replaces."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []
    handlers = {
        number: signal.signal(number, lambda number, _: caught.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    except SystemExit:  # Ray's own handler raised it
        caught.append(signal.SIGTERM)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for waiting in caught:
        signal.raise_signal(waiting)


@contextmanager
def _silent_start() -> Iterator[None]:
    """Hides the messages that Ray's core, in C++, prints while it starts. Errors are still raised."""
    sys.stderr.flush()
    terminal = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)


@contextmanager
def _one_display() -> Iterator[None]:
    """Hides Ray Data's log, and moves Ray's messages about dead workers to standard error."""
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)
