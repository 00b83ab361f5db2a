"""Jobs of stage one on a Ray cluster: Ray Data over a pool of workers, each with a model of its own.

Only token ids travel to a worker, in blocks of batches; it writes its own shards into the cache. Ray runs the
block of a dead worker again, which writes files of the same names and bytes as far as it had come. What kills its
workers again and again ends the run.
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
from adpa.errors import CacheError, EngineError, OptionError
from adpa.pipeline.scoring.jobs import Job, write_batches
from adpa.progress import progress

Item = TypeVar("Item")
Result = TypeVar("Result")

warnings = logging.getLogger(__name__)

PATIENCE = 5  # seconds for a cluster to take a connection
ADVICE = (
    "run adpa on a machine of the cluster, check it with ray status; a cluster with a token wants RAY_AUTH_MODE=token"
)
TRY_TO_JOIN = """
import sys
sys.path = [folder for folder in sys.path if folder]  # not the working directory, whatever lies there
import ray
try:
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
except Exception as error:
    sys.exit(print(str(error).partition("\\n")[0]) or 1)
"""
TRIES = 3  # workers that may die over the same work
BATCHES_PER_BLOCK = 32  # at most: a dead worker's block is lost


def check_address(address: str) -> None:
    """Checks that a cluster answers at an address, without waiting long, and that this machine is one of it.

    Raises:
        OptionError: it does not, or it is no address, or this process is in a cluster already.
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
            socket.create_connection((host.strip("[]"), int(port)), PATIENCE).close()
        except (OSError, OverflowError) as error:
            raise OptionError(f"{problem}: it does not answer: {error}", ADVICE) from error
    try:  # Ray itself would wait for minutes at a port where something else listens
        command = [sys.executable, "-c", TRY_TO_JOIN, address]
        tried = subprocess.run(command, capture_output=True, timeout=4 * PATIENCE, check=False)
        failed, said = tried.returncode != 0, tried.stdout
    except subprocess.TimeoutExpired as late:
        failed, said = True, late.stderr or b""
    if failed:
        reason = said.decode(errors="replace").strip().rpartition("\n")[2].rpartition("] ")[2]
        reason = re.sub(r"^\w+\.(cc|h):\d+: ", "", reason)  # where in Ray's core it was said
        raise OptionError(f"{problem}: no Ray cluster answers{': ' if reason else ''}{reason}", ADVICE)


class RayExecutor:
    """An ``Executor``: workers on a Ray cluster, which is joined or started when there is work for it.

    Leaving its context stops what it has started. A process that has joined a cluster before goes on with that one.

    Args:
        workers: how many.
        address: of a cluster; without it one is started on this machine.
        gpus: what each worker needs, all on one machine; with none, it gets its share of the CPUs.
        cache: what every worker must see under the same name; a file there is the sign by which they know it.
    """

    def __init__(self, workers: int, address: str | None, gpus: int, cache: Location) -> None:
        self._workers, self._address, self._gpus = workers, address, gpus
        self._cpus = 1
        self._sign = cache / f".workers.{uuid.uuid4().hex}"
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
            AdpaError: what a worker raised; or Ray failed, the cluster is too small, does not answer or does not see
                the cache.
        """
        self._start()
        write_file(self._sign, b"")
        blocks = _blocks(batches, self._workers)
        attempts = ray.remote(_Attempts).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote()
        rows = [{"number": number, "batches": pickle.dumps(block)} for number, block in enumerate(blocks)]
        answers = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _Worker,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(self._workers, len(blocks)), max_tasks_in_flight_per_actor=2),
            fn_constructor_args=(job, attempts, TRIES * self._workers, self._sign),
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
                    found: _Answer = pickle.loads(answer["answer"])
                    if found.error is not None:
                        raise found.error from EngineError(found.trace)
                    if found.tries > 1:
                        warnings.warning("a worker died; its batches were done by another, at try %d", found.tries)
                    write_file(self._sign, b"")  # what is older than a day is garbage
                    results += found.results
                    advance(sum(job.size(item) for batch in blocks[answer["number"]] for item in batch))
            except ray.exceptions.RayError as error:
                raise EngineError(
                    f"Ray: {type(error).__name__}: {_first_line(error)}", "what was written is kept: run it again"
                ) from error
        return results

    def _start(self) -> None:
        if self._started:
            return
        self._started = True
        own = not ray.is_initialized() and self._address is None
        if not ray.is_initialized():
            self._stack.callback(ray.shutdown)  # also when a signal comes while it starts
            _join(self._address)
        elif self._address is not None:
            raise OptionError(
                f"--ray-address {self._address}: this process is in a Ray cluster already", "leave it out"
            )
        self._cpus = self._share(own)
        self._stack.callback(remove_file, self._sign)

    def _share(self, own: bool) -> int:
        """CPUs of a worker: as many as all of them have room for, one if the cluster works for others too."""
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
        if not own:
            free = ray.available_resources()
            if (begin := int(free.get(kind, 0)) // each) < self._workers:
                warnings.warning(
                    "the cluster is busy: %d of %d workers can begin, the rest when others end", begin, self._workers
                )
            if free.get("CPU", 0) < sum(cpus):
                return 1
        if self._gpus:
            return 1
        return next(share for share in range(max(cpus), 0, -1) if sum(n // share for n in cpus) >= self._workers)


class _Attempts:
    """Counts how often each piece of work was begun since it was last finished."""

    def __init__(self) -> None:
        self._begun: Counter[object] = Counter()

    def begin(self, work: object) -> int:
        self._begun[work] += 1
        return self._begun[work]

    def finish(self, work: object) -> None:
        del self._begun[work]


@dataclass(frozen=True)
class _Answer:
    """What became of a block: what writing gave, or what went wrong; and which try it was."""

    results: list[Any]
    error: Exception | None = None
    trace: str = ""
    tries: int = 1


class _Worker:
    """An open job in a process of its own. What goes wrong is an answer, so that it is told as anywhere else."""

    def __init__(self, job: Job[Any, Any], attempts: Any, openings: int, sign: Location) -> None:
        self._job, self._attempts = job, attempts
        self._stack = ExitStack()
        self._broken: _Answer | None = None
        try:
            if ray.get(attempts.begin.remote("open")) > openings:
                raise EngineError("workers died again and again while they loaded a model", "do they have the memory?")
            if not sign.exists():
                raise CacheError(
                    f"{sign.parent}: {platform.node()} does not see this cache",
                    "put it where all machines of the cluster see it, or into an object store",
                )
            self._ask = self._stack.enter_context(job.open())
            ray.get(attempts.finish.remote("open"))
        except Exception as error:
            self._broken = _failed(error)

    def __call__(self, block: dict[str, Any]) -> dict[str, list[Any]]:
        number, batches = int(block["number"][0]), pickle.loads(block["batches"][0])
        return {"number": [number], "answer": [pickle.dumps(self._broken or self._answer(number, batches))]}

    def __del__(self) -> None:
        self._stack.close()

    def _answer(self, number: int, batches: Sequence[Sequence[Any]]) -> _Answer:
        results: list[Any] = []
        try:
            tries = ray.get(self._attempts.begin.remote(number))
            if tries > TRIES:
                raise EngineError(
                    f"{TRIES} workers died over the same batches, one after the other",
                    "do they have the memory? lower --batch-tokens or --workers; what was written is kept",
                )
            write_batches("", batches, self._job.size, self._ask(batches), lambda write: results.append(write()))
            ray.get(self._attempts.finish.remote(number))
        except Exception as error:
            return _failed(error)
        return _Answer(results, tries=tries)


def _blocks(batches: Sequence[Sequence[Item]], workers: int) -> list[Sequence[Sequence[Item]]]:
    """Large blocks first, for an engine's queue runs empty between two; small ones last, so that all end together.

    Each is half of what is left for a worker.
    """
    blocks: list[Sequence[Sequence[Item]]] = []
    start = 0
    while start < len(batches):
        size = min(max((len(batches) - start) // (2 * workers), 1), BATCHES_PER_BLOCK)
        blocks.append(batches[start : start + size])
        start += size
    return blocks


def _failed(error: Exception) -> _Answer:
    """The answer of a worker with an error, in a form that can be pickled."""
    trace = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its class does
        error = EngineError(f"{type(error).__name__}: {_first_line(error)}")
    return _Answer([], error, trace)


def _join(address: str | None) -> None:
    """Joins a cluster, or starts one on this machine."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # else it warns of what Ray Data does with our arguments
    own: dict[str, Any] = {"include_dashboard": False} if address is None else {}
    with _signals_after(), _silence():
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **own)


@contextmanager
def _signals_after() -> Iterator[None]:
    """Lets signals wait until Ray has started all of its processes, and keeps our handlers, of which it sets some."""
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
    except SystemExit:  # by Ray's own handler
        caught.append(signal.SIGTERM)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for waiting in caught:
        signal.raise_signal(waiting)


@contextmanager
def _silence() -> Iterator[None]:
    """Keeps from the terminal what Ray's core, which is no Python, says while it starts; errors are raised."""
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
    """Keeps Ray Data's log from the terminal, and what Ray says of dead workers from standard output."""
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
