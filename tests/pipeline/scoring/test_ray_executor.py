"""Workers of a real Ray cluster with two CPUs write the same cache as one process, even if workers die."""

import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from tests.conftest import heed_signals
from tests.data.makers import token_ids
from tests.pipeline.conftest import Filled, synthetic
from upath import UPath

from adpa import collect_garbage, precompute, verify_cache
from adpa.data.cache.format import prepare_cache
from adpa.data.cache.locations import Location
from adpa.data.cache.shards import list_shards, read_shard
from adpa.data.cache.signal_rows import SignalRow
from adpa.data.cache.signals import ModelIdentity, Scoring
from adpa.errors import CacheError, EngineError, ModelError, OptionError
from adpa.pipeline.models.checkpoint import open_checkpoint
from adpa.pipeline.scoring.jobs import Executor, run_here
from adpa.pipeline.scoring.ray_executor import BATCHES_PER_BLOCK, RayExecutor, _blocks, check_address
from adpa.pipeline.scoring.score import Batch, ReferenceLogprobs, missing_sequences, score

SCORING = Scoring(ModelIdentity("teacher", None, "a"), None, "v", 3, "float32", "hf")
SEQUENCES = [synthetic(token_ids(5, number), token_ids(7, 9, 10 + number)) for number in range(24)]
BATCH_TOKENS = 5  # one sequence in each batch
NUMBERS = [[number] for number in range(20)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster that this process has joined, so that all tests share it."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    # Workers cannot import the tests: definitions of this file are pickled by value.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    ray.shutdown()


def nothing() -> None:
    """The usual event: nothing."""


def die() -> None:
    """Kills the process, as the system does if memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Squares:
    """A job without a model. An event happens when it opens, or at one of its numbers."""

    opening: Callable[[], object] = nothing
    at_seven: Callable[[], object] = nothing

    counts = "numbers"

    def size(self, number: int) -> int:
        return 1

    @contextmanager
    def open(self) -> Iterator[Callable[[Sequence[Sequence[int]]], Iterator[Callable[[], int]]]]:
        self.opening()
        yield self._ask

    def _ask(self, batches: Sequence[Sequence[int]]) -> Iterator[Callable[[], int]]:
        for (number,) in batches:
            if number == 7:
                self.at_seven()
            yield partial(pow, number, 2)


def do(job: Squares, cache: Location, workers: int = 1) -> list[int]:
    with RayExecutor(workers, None, 0, cache) as run:
        return run(job, NUMBERS)


@dataclass(frozen=True)
class Teacher:
    """A scorer that gives all sequences the same numbers, after an event."""

    happen: Callable[[bytes], object]

    def top_k(self, batches: Sequence[Batch], top_k: int) -> Iterator[list[SignalRow]]:
        for batch in batches:
            for sequence in batch:
                self.happen(sequence.key)
            yield [
                SignalRow(
                    sequence.key,
                    token_logprobs=np.full(len(sequence.response_ids), -3, np.float32),
                    topk_ids=np.tile(np.arange(top_k, dtype=np.int32), (len(sequence.response_ids), 1)),
                    topk_logprobs=np.tile(
                        np.log([0.5, 0.25, 0.125]).astype(np.float32), (len(sequence.response_ids), 1)
                    ),
                    tail_logprob=np.full(len(sequence.response_ids), np.log(0.125), np.float32),
                )
                for sequence in batch
            ]

    def logprobs_at(self, batches: object, topk_ids: object) -> Iterator[list[ReferenceLogprobs]]:
        raise NotImplementedError

    def close(self) -> None:
        pass


def fill(cache: Path, run: Executor, happen: Callable[[bytes], object] = lambda _: None, count: int = 24) -> None:
    """Scores the sequences that the cache lacks, of the first ``count``."""
    prepare_cache(cache)
    missing = missing_sequences(cache, SCORING, SEQUENCES[:count])
    score(cache, SCORING, missing, lambda _: Teacher(happen), BATCH_TOKENS, run)


def files(cache: Path) -> dict[str, bytes]:
    return {str(path.relative_to(cache)): path.read_bytes() for path in cache.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_two_workers_make_the_cache_that_one_process_makes(
    cluster: None, few_words: Filled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples and signals: every file has the same name and the same bytes, but for the sets' record of their time."""
    options: dict[str, Any] = {
        "teacher": str(few_words.models.teacher),
        "reference": str(few_words.models.reference),
        "student": str(few_words.models.student),
        "responses": "chosen,rejected,sampled",
        "data": str(few_words.data),
        "max_new_tokens": 6,
        "batch_tokens": 60,
    }
    monkeypatch.chdir(tmp_path)
    here = precompute(**options, cache=Path("here"))
    there = precompute(**options, cache=Path("there"), executor="ray", workers=2)
    here_files, there_files = (
        {name: content for name, content in files(Path(cache)).items() if not name.startswith("responses/")}
        for cache in ("here", "there")
    )
    assert here_files == there_files
    assert any(name.startswith("samples/") for name in here_files)
    assert (there.scored, there.sampled, there.bytes, there.responses) == (
        here.scored, here.sampled, here.bytes, here.responses,
    )  # fmt: skip
    assert (here.workers, there.workers) == (1, 2)
    assert ray.is_initialized(), "the cluster of this process was not the run's to stop"


@pytest.mark.slow
def test_a_second_job_adds_to_the_cache_and_the_block_of_a_killed_worker_is_done_by_another(
    cluster: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It dies in the middle of a block. Another worker writes its files again, under the same names."""
    fill(tmp_path / "here", run_here)
    fill(tmp_path / "there", run_here, count=4)
    first = files(tmp_path / "there")
    asked, died = tmp_path / "asked", tmp_path / "died"

    def die_once(key: bytes) -> None:
        with asked.open("a") as log:
            log.write(key.hex() + "\n")
        if key == SEQUENCES[-1].key and not died.exists():
            died.touch()
            die()

    with RayExecutor(2, None, 0, tmp_path / "there") as run:
        fill(tmp_path / "there", run, die_once)
    assert died.exists()
    assert asked.read_text().split().count(SEQUENCES[-1].key.hex()) == 2
    assert not {sequence.key.hex() for sequence in SEQUENCES[:4]} & set(asked.read_text().split())
    assert "a worker died; another one did its batches, at try 2" in caplog.messages

    assert first.items() < files(tmp_path / "there").items()
    assert files(tmp_path / "there") == files(tmp_path / "here")
    report = verify_cache(tmp_path / "there")
    assert (report.failure, report.unfinished) == ("", 0)
    (folder,) = (tmp_path / "there" / "scorings").iterdir()
    keys = [key for path in list_shards(folder, "signals") for key in read_shard(path)["key"].to_pylist()]
    assert Counter(keys) == Counter(sequence.key for sequence in SEQUENCES)


@pytest.mark.slow
def test_work_that_kills_every_worker_ends_the_run(cluster: None, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="3 workers died over the same batches, one after the other") as caught:
        do(Squares(at_seven=die), tmp_path)
    assert caught.value.exit_code == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_workers_that_die_while_they_load_a_model_end_the_run(cluster: None, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="several workers died while they loaded a model"):
        do(Squares(opening=die), tmp_path)


class StubbornError(Exception):
    """An error that pickles but cannot be unpickled."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} {two}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "error", "kind", "message"),
    [
        ("opening", lambda: ModelError("teacher: broken", "mend it"), ModelError, "teacher: broken; mend it"),
        ("at_seven", lambda: OSError(28, "No space left on device"), OSError, "No space left"),
        ("at_seven", lambda: StubbornError("not", "portable"), EngineError, "StubbornError: not portable"),
    ],
)
def test_a_workers_error_is_told_as_if_it_were_here(
    moment: str, error: Callable[[], Exception], kind: type[Exception], message: str, cluster: None, tmp_path: Path
) -> None:
    def fail() -> None:
        raise error()

    with pytest.raises(kind, match=message) as caught:
        do(Squares(**{moment: fail}), tmp_path)
    assert "in fail" in str(caught.value.__cause__), "the traceback of the worker, for --debug"


def test_a_machine_that_does_not_see_the_cache_does_nothing(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adpa.pipeline.scoring.ray_executor.write_file", lambda *_: None)  # as if on another disk
    with pytest.raises(CacheError, match=r"does not see this cache; put it where all machines") as caught:
        do(Squares(opening=die), tmp_path)
    assert "Traceback" in str(caught.value.__cause__), "for --debug"


def test_a_cache_in_the_memory_of_one_process_is_seen_by_no_worker(cluster: None) -> None:
    with pytest.raises(CacheError, match="does not see this cache"):
        do(Squares(), UPath("memory://cache"))


@pytest.mark.slow
def test_workers_that_begin_after_a_day_know_the_cache_too(cluster: None, tmp_path: Path) -> None:
    """The marker file in it looks like a leftover of a killed run."""
    prepare_cache(tmp_path)

    def wait_and_collect() -> None:
        for sign in tmp_path.glob(".workers.*"):
            os.utime(sign, (0, 0))
        assert collect_garbage(tmp_path, yes=True).garbage

    with RayExecutor(1, None, 0, tmp_path) as run:
        assert len(run(Squares(), NUMBERS)) == len(NUMBERS)
        wait_and_collect()
        assert len(run(Squares(), NUMBERS)) == len(NUMBERS)
    assert not list(tmp_path.glob(".workers.*"))


@pytest.mark.slow
def test_a_busy_cluster_is_told_of_and_a_worker_takes_what_there_is(
    cluster: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Another job holds one of the two CPUs: a single worker takes the other, and a second worker waits."""
    wait_for_free_cpus(2)
    other: Any = ray.remote(object).options(num_cpus=1).remote()
    for workers in (1, 2):
        wait_for_free_cpus(1)
        assert sorted(do(Squares(), tmp_path, workers)) == [number**2 for (number,) in NUMBERS]
        said = (
            ["the cluster is busy: 1 of 2 workers can start now, the others when resources are free"]
            if workers == 2
            else []
        )
        assert caplog.messages == said
    ray.kill(other)


def wait_for_free_cpus(count: int) -> None:
    """Waits, because Ray notices ended workers late."""
    while ray.available_resources().get("CPU", 0) != count:
        time.sleep(0.1)


@pytest.mark.slow
def test_a_signal_while_ray_starts_leaves_no_cluster_behind(tmp_path: Path) -> None:
    program = """
import os, signal, sys
from pathlib import Path
import psutil, ray
from adpa.pipeline.scoring.ray_executor import RayExecutor
start = ray.init
def interrupted(**options):
    start(**options)
    os.kill(os.getpid(), signal.SIGINT)
ray.init = interrupted
try:
    with RayExecutor(1, None, 0, Path(sys.argv[1])) as run:
        run(None, [[1]])
except KeyboardInterrupt:
    _, alive = psutil.wait_procs(psutil.Process().children(recursive=True), timeout=20)
    print(ray.is_initialized(), alive)
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=heed_signals)
    assert done.stdout == "False []\n", done.stderr


def test_more_workers_than_the_cluster_has_room_for_are_refused(cluster: None, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--workers 3: the cluster has room for 2; each takes 1 CPU of one machine"):
        do(Squares(), tmp_path, workers=3)
    with RayExecutor(1, None, 8, tmp_path) as run, pytest.raises(OptionError, match="room for 0; each takes 8 GPU"):
        run(Squares(), NUMBERS)


def test_a_process_that_is_in_a_cluster_joins_no_other(cluster: None) -> None:
    with pytest.raises(OptionError, match="--ray-address auto: this process is in a Ray cluster already"):
        check_address("auto")


@pytest.mark.parametrize("address", ["cluster", "ray://head:10001", "head:", ":6379", "auto:x"])
def test_what_is_no_address_is_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # ignores the cluster of the other tests
    with pytest.raises(OptionError, match=f"--ray-address {address}; expected auto or host:port"):
        check_address(address)


@pytest.mark.slow
def test_an_address_that_does_not_answer_is_refused_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules in the working directory do not shadow Ray's."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ray.py").write_text("open('imported', 'w')")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr("adpa.pipeline.scoring.ray_executor.CONNECT_SECONDS", 1)
        with pytest.raises(OptionError, match=f"--ray-address {address}: no Ray cluster answers"):
            check_address(address)
    with pytest.raises(OptionError, match=f"--ray-address {address}: it does not answer: .*refused"):
        check_address(address)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(OptionError, match=f"auto, where RAY_ADDRESS is {address}: no Ray cluster answers"):
        check_address("auto")
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize(("batches", "workers"), [(1, 1), (3, 2), (17, 2), (200, 2), (5000, 8)])
def test_blocks_hold_every_batch_once_and_shrink_with_what_is_left_for_a_worker(batches: int, workers: int) -> None:
    blocks = _blocks([[number] for number in range(batches)], workers)
    assert [item for block in blocks for batch in block for item in batch] == list(range(batches))
    sizes = list(map(len, blocks))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == min(max(batches // (2 * workers), 1), BATCHES_PER_BLOCK)
    assert sizes[-workers:] == [1] * min(workers, batches), "none waits long for the last one"
    assert len(blocks) >= min(batches, 4 * workers)


@pytest.mark.slow
def test_a_stop_leaves_no_process_behind(few_words: Filled, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "adpa", "precompute", "--executor", "ray", "--workers", "2", "--batch-tokens", "9"]
    command += ["--teacher", str(few_words.models.teacher), "--data", str(few_words.data), "--cache", str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    started: set[psutil.Process] = set()
    while process.poll() is None and not any("MapWorker" in name(child) for child in started):
        started |= set(psutil.Process(process.pid).children(recursive=True))
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (
        128 + signal.SIGTERM,
        "adpa: stopped; the same command goes on from what is stored\n",
    )
    _, alive = psutil.wait_procs(started, timeout=10)
    assert not alive


def name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def test_a_job_takes_the_digest_of_a_checkpoint_with_it_and_not_its_tokenizer(few_words: Filled) -> None:
    checkpoint = open_checkpoint(str(few_words.models.teacher))
    assert checkpoint.identity
    assert checkpoint.tokenizer
    copy = pickle.loads(pickle.dumps(checkpoint))
    assert "tokenizer" in vars(checkpoint)
    assert vars(copy).keys() == vars(checkpoint).keys() - {"config", "tokenizer"}
    assert copy.identity == checkpoint.identity
