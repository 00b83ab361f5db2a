"""Any interleaving of precompute runs over overlapping data sets ends in the same rows as one run.

The runs are whole calls of ``precompute``, with ``cache gc`` and ``cache pack`` beside them, in threads of their own of
which one moves at a time. A run can stop before a model answers a batch, and before a file of the cache is opened for
writing, appears, vanishes, is listed or is read. Hypothesis draws who goes on next, up to which stop, and who is killed
there. The models are no networks, but say of a sequence what its key says, so that rows can be compared bit for bit.
"""

import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cache as remember
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from adpa import precompute
from adpa.data.encoding import TokenIds, TokenSequence
from adpa.data.format import prepare_cache
from adpa.data.responses import ResponseSet, read_response_sets
from adpa.data.samples import SampleRequest
from adpa.data.shards import read_shard
from adpa.data.signal_rows import SignalRow
from adpa.data.signals import ModelIdentity, SignalTable, read_scorings, read_signals
from adpa.pipeline import precompute as stage
from adpa.pipeline.cache_gc import collect_garbage
from adpa.pipeline.cache_pack import pack_cache
from adpa.pipeline.precompute import PrecomputeReport
from adpa.pipeline.sampling import sample_responses
from adpa.pipeline.scoring import Batch, ReferenceLogprobs

PATIENCE = 60  # seconds for one step
NEW_TOKENS = 4
WORDS = [f"w{number}" for number in range(12)]
VOCABULARY = ["<pad>", "<unk>", "<user>", "<assistant>", "<end>", *WORDS]
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}> {{ message.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
EXAMPLES = [
    {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    for prompt, chosen, rejected in (
        ("w0", "w1 w2", "w3"),
        ("w0", "w3", "w4 w5 w6"),  # its chosen response is the one above's rejected one
        ("w1 w2 w3", "w4", "w5 w5"),
        ("w6 w7", "w8 w9 w10 w11 w0", "w1"),
        ("w8", "w2 w2 w2", "w2 w2"),
        ("w9 w9 w9 w9", "w10", "w11 w3 w4 w5"),
    )
]


class Killed(BaseException):
    """Stands for the end of a process."""


@dataclass(frozen=True)
class Job:
    """What a run of ``precompute`` is asked for, and whether its writing thread is slow."""

    examples: tuple[int, ...]
    responses: str
    samples: int
    batch_tokens: int = 40
    writes_late: bool = False

    def sampled(self) -> bool:
        return "sampled" in self.responses

    def run(self, cache: Path, reference: str | None) -> PrecomputeReport:
        """The real stage on these examples."""
        with TemporaryDirectory() as folder:
            data = Path(folder) / "prefs.jsonl"
            data.write_text("".join(json.dumps(EXAMPLES[number]) + "\n" for number in self.examples))
            return precompute(
                teacher="teacher",
                reference=reference,
                student="student" if self.sampled() else None,
                responses=self.responses,
                data=str(data),
                cache=cache,
                top_k=3,
                samples_per_prompt=self.samples,
                max_new_tokens=NEW_TOKENS,
                batch_tokens=self.batch_tokens,
                device="cpu",
            )


@dataclass(frozen=True)
class Chore:
    """A command on the cache that may run beside."""

    command: str
    writes_late = False

    def run(self, cache: Path, reference: str | None) -> None:
        """The real command; it begins by making the cache where a run has not come that far."""
        prepare_cache(cache)
        if self.command == "gc":
            collect_garbage(cache, yes=True)
        else:
            pack_cache(cache)


OPERATIONS = {"open": os, "rename": os, "listdir": os, "read_bytes": Path, "unlink": Path, "rmdir": Path}
STOPS = ("answer", *OPERATIONS)


@dataclass(frozen=True)
class Turn:
    """One run goes on until it stands before such an operation, so many times; it may be killed there."""

    run: int
    until: str
    times: int
    killed: bool


class Run(threading.Thread):
    """A job or chore in a thread that moves only when it is told to, and only to its next stop."""

    by_thread: ClassVar[dict[int, "Run"]] = {}

    def __init__(self, work: Job | Chore, cache: Path, reference: str | None) -> None:
        super().__init__(daemon=True)
        self.work, self.cache, self.reference = work, cache, reference
        self.asked: list[tuple[str, bytes]] = []
        self.report: PrecomputeReport | None = None
        self.error: BaseException | None = None
        self.killed = self.over = False
        self._before = ""
        self._go, self._stands = threading.Semaphore(0), threading.Semaphore(0)
        self.start()

    def run(self) -> None:
        Run.by_thread[threading.get_ident()] = self
        try:
            self._wait()
            self.report = self.work.run(self.cache, self.reference)
        except Killed:
            pass
        except BaseException as error:
            self.error = error
        finally:
            del Run.by_thread[threading.get_ident()]
            self.over = True
            self._stands.release()

    def stop(self, before: str) -> None:
        """Waits, in the run's own thread, until it may go on."""
        if not self.killed:  # else the exception is on its way
            self._before = before
            self._stands.release()
            self._wait()

    def go_on(self, until: str = "its end", times: int = 1) -> None:
        """Lets the run go on, and waits until it stands before such an operation, or has ended."""
        while not self.over and times > 0:
            self._go.release()
            assert self._stands.acquire(timeout=PATIENCE), "a run hangs"
            times -= self._before == until
        if self.error is not None:
            raise self.error

    def kill(self) -> None:
        """Ends the run where it stands."""
        self.killed = self.killed or not self.over
        self._go.release()
        self.join(PATIENCE)

    def _wait(self) -> None:
        if not self._go.acquire(timeout=PATIENCE) or self.killed:
            self.killed = True
            raise Killed


def stop(before: str, path: object = "") -> None:
    """Where another run may come in between; it is nothing for other threads, and for files outside of the cache."""
    run = Run.by_thread.get(threading.get_ident())
    if run is not None and (before == "answer" or str(path).startswith(str(run.cache))):
        run.stop(before)


def note_asked(role: str, keys: Iterable[bytes]) -> None:
    run = Run.by_thread.get(threading.get_ident())
    if run is not None:
        run.asked += [(role, key) for key in keys]


class Write:
    """A batch that is to be written."""

    def __init__(self, write: Callable[[], object]) -> None:
        self._write: Callable[[], object] | None = write

    def result(self) -> None:
        write, self._write = self._write, None
        if write is not None:
            write()


class Writer:
    """The writing thread of ``write_batches``, as part of the run's steps: it writes at once, or as late as it may."""

    def __init__(self, max_workers: int) -> None:
        assert max_workers == 1

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, write: Callable[[Any], object], result: object) -> Write:
        writing = Write(partial(write, result))
        run = Run.by_thread.get(threading.get_ident())
        if run is None or not run.work.writes_late:
            writing.result()
        return writing


class Oracle:
    """A ``Scorer`` and ``Sampler`` that says of a sequence, or to a request, what the key says. T tokens, K ids."""

    def __init__(self, name: str) -> None:
        self._name = name
        stop("answer")

    def top_k(self, batches: Sequence[Batch], top_k: int) -> Iterator[list[SignalRow]]:
        for batch in batches:
            self._ask(sequence.key for sequence in batch)
            yield [self._judge(sequence, top_k) for sequence in batch]

    def logprobs_at(
        self, batches: Sequence[Batch], topk_ids: Iterable[Sequence[NDArray[np.int32]]]
    ) -> Iterator[list[ReferenceLogprobs]]:
        for batch, given_ids in zip(batches, topk_ids, strict=True):
            self._ask(sequence.key for sequence in batch)
            answers = []
            for sequence, ids_TK in zip(batch, given_ids, strict=True):
                logprobs_TV = self._logprobs(sequence)
                own_T = logprobs_TV[np.arange(len(logprobs_TV)), sequence.response_ids]
                answers.append((own_T, np.take_along_axis(logprobs_TV, ids_TK, axis=1)))
            yield answers

    def sample(self, batches: Sequence[Sequence[SampleRequest]]) -> Iterator[list[TokenIds]]:
        for batch in batches:
            self._ask(request.key for request in batch)
            answers = []
            for request in batch:
                generator = self._numbers(request.key)
                response = generator.integers(4, len(VOCABULARY), generator.integers(1, NEW_TOKENS + 1), np.int32)
                answers.append(response)
            yield answers

    def close(self) -> None:
        stop("answer")

    def _ask(self, keys: Iterable[bytes]) -> None:
        stop("answer")
        note_asked(self._name, keys)

    def _judge(self, sequence: TokenSequence, top_k: int) -> SignalRow:
        logprobs_TV = self._logprobs(sequence)
        order_TV = np.argsort(-logprobs_TV, axis=1, kind="stable").astype(np.int32)
        sorted_TV = np.take_along_axis(logprobs_TV, order_TV, axis=1)
        return SignalRow(
            sequence.key,
            token_logprobs=logprobs_TV[np.arange(len(logprobs_TV)), sequence.response_ids],
            topk_ids=order_TV[:, :top_k],
            topk_logprobs=sorted_TV[:, :top_k],
            tail_logprob=np.log(np.exp(sorted_TV[:, top_k:]).sum(axis=1)),
        )

    def _logprobs(self, sequence: TokenSequence) -> NDArray[np.float32]:
        shape = len(sequence.response_ids), len(VOCABULARY)
        logits_TV = self._numbers(sequence.key).normal(0, 2, shape)
        logprobs_TV: NDArray[np.float64] = logits_TV - np.log(np.exp(logits_TV).sum(axis=1, keepdims=True))
        return logprobs_TV.astype(np.float32)

    def _numbers(self, key: bytes) -> np.random.Generator:
        return np.random.default_rng([len(self._name), int.from_bytes(key, "little")])


@pytest.fixture(scope="module", autouse=True)
def _models_and_steps() -> Iterator[None]:
    """Names of models lead to oracles, and runs stop before operations on files."""
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<end>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, chat_template=TEMPLATE, **special)

    def open_checkpoint(name: str) -> SimpleNamespace:
        return SimpleNamespace(
            name=name,
            identity=ModelIdentity(name, None, f"{name}'s weights"),
            tokenizer=tokenizer,
            config=SimpleNamespace(vocab_size=len(VOCABULARY)),
            dtype_name=lambda _: "float32",
            check_positions=lambda _: None,
            check_ids=lambda _: None,
        )

    def open_oracle(checkpoint: SimpleNamespace, *_: object) -> Oracle:
        return Oracle(checkpoint.name)

    engine = SimpleNamespace(
        name="oracle",
        sampling_name="oracle",
        reason="a test",
        max_tokens=None,
        extra_positions=0,
        open_scorer=open_oracle,
        open_sampler=open_oracle,
    )

    def stopping(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def stop_first(path: Any, *arguments: Any, **options: Any) -> Any:
            stop(name, path)
            return operation(path, *arguments, **options)

        return stop_first

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "open_checkpoint", open_checkpoint)
        patch.setattr(stage, "choose_engine", lambda *_: engine)
        patch.setattr("adpa.pipeline.batching.ThreadPoolExecutor", Writer)
        for name, owner in OPERATIONS.items():
            patch.setattr(owner, name, stopping(name, getattr(owner, name)))
        patch.setattr(os, "fsync", lambda _: None)  # nobody pulls the plug here
        yield


Row = tuple[object, ...]


def bits(row: SignalRow) -> Row:
    """A row as something that is equal to another only bit for bit."""
    values = [getattr(row, field.name) for field in fields(row)]
    return tuple((v.dtype.str, v.shape, v.tobytes()) if isinstance(v, np.ndarray) else v for v in values)


def read_rows(cache: Path) -> dict[bytes, Row]:
    """The only scoring's row of each key, none of which may have two different rows in any of the shards."""
    rows: dict[bytes, Row] = {}
    for scoring in read_scorings(cache):
        table = read_signals(cache, scoring)
        for number in range(len(table)):
            row = table.row(number)
            assert rows.setdefault(row.key, bits(row)) == bits(row), "a key with two rows"
    return rows


def read_keys(cache: Path) -> set[bytes]:
    return set().union(*(read_signals(cache, scoring).keys() for scoring in read_scorings(cache)))


def read_waiting(cache: Path) -> set[bytes]:
    """Keys of the rows that the teacher has left for the reference."""
    return SignalTable(read_shard(path) for path in cache.glob("scorings/*/pending/*.arrow")).keys()


def read_sets(cache: Path) -> dict[str, ResponseSet]:
    return {found.id: found for found in read_response_sets(cache)}


def check_same_sets(found: dict[str, ResponseSet], expected: dict[str, ResponseSet]) -> None:
    assert found.keys() == expected.keys()
    for name, responses in expected.items():
        assert found[name].info == responses.info
        assert found[name].table.equals(responses.table, check_metadata=True)


@remember
def alone(
    examples: frozenset[int], responses: str, samples: int, reference: str | None
) -> tuple[dict[str, ResponseSet], dict[bytes, Row]]:
    """The response sets and rows of a run that nothing disturbs, in a cache of its own."""
    with TemporaryDirectory() as folder:
        Job(tuple(sorted(examples)), responses, samples).run(Path(folder) / "cache", reference)
        return read_sets(Path(folder) / "cache"), read_rows(Path(folder) / "cache")


def alone_as(job: Job, reference: str | None) -> tuple[dict[str, ResponseSet], dict[bytes, Row]]:
    return alone(frozenset(job.examples), job.responses, job.samples if job.sampled() else 1, reference)


def join(jobs: Sequence[Job]) -> Job:
    """One run for all that some are asked for."""
    names = [name for name in ("chosen", "rejected", "sampled") if any(name in job.responses for job in jobs)]
    examples = sorted({number for job in jobs for number in job.examples})
    return Job(tuple(examples), ",".join(names), max(job.samples for job in jobs))


JOBS = st.builds(
    Job,
    examples=st.lists(st.integers(0, len(EXAMPLES) - 1), min_size=1, unique=True).map(tuple),
    responses=st.sampled_from(["chosen", "chosen,rejected", "rejected", "sampled", "chosen,rejected,sampled"]),
    samples=st.integers(1, 2),
    batch_tokens=st.integers(1, 60),
    writes_late=st.booleans(),
)
TURNS = st.builds(
    Turn,
    run=st.integers(0, 5),
    until=st.sampled_from([*STOPS, "its end"]),
    times=st.integers(1, 4),
    killed=st.sampled_from([False] * 5 + [True]),
)


TWINS = [Job((0, 1, 2), "chosen,rejected", samples=1, batch_tokens=1)] * 2
TEACHER_IS_DONE = Turn(0, "answer", 8, killed=False)  # it was opened, answered five batches and was closed; reference
GONE_BETWEEN_LISTING_AND_READING = [TEACHER_IS_DONE, Turn(1, "read_bytes", 1, killed=False)]
GONE_AFTER_IT_WAS_WRITTEN_AGAIN = [
    Turn(1, "answer", 1, killed=False),
    TEACHER_IS_DONE,
    Turn(0, "unlink", 1, killed=False),
    Turn(1, "read_bytes", 1, killed=False),
]
HEIRS = [Job((0, 1, 2), "chosen,rejected", 1, batch_tokens=60), Job((0,), "chosen", 1)]
KILLED_BEFORE_THE_REFERENCE = [Turn(0, "answer", 4, killed=True), Turn(2, "its end", 1, killed=False)]


@settings(max_examples=40, deadline=None)
@example(TWINS, [], GONE_BETWEEN_LISTING_AND_READING, "reference")
@example(TWINS, [], GONE_AFTER_IT_WAS_WRITTEN_AGAIN, "reference")
@example(HEIRS, [Chore("gc")], KILLED_BEFORE_THE_REFERENCE, "reference")
@given(
    jobs=st.lists(JOBS, min_size=2, max_size=4),
    chores=st.lists(st.builds(Chore, st.sampled_from(["gc", "pack"])), max_size=2),
    turns=st.lists(TURNS, min_size=2, max_size=20),
    reference=st.sampled_from(["reference"] * 3 + [None]),
)
def test_any_interleaving_of_runs_ends_in_the_rows_of_one_run(
    jobs: list[Job], chores: list[Chore], turns: list[Turn], reference: str | None
) -> None:
    whole = join(jobs)
    expected_sets, expected_rows = alone_as(whole, reference)
    with TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        works: list[Job | Chore] = [*jobs, *chores]
        runs = [Run(work, cache, reference) for work in works]
        try:
            keys, judged = set[bytes](), set[bytes]()
            in_order = [Turn(number, "its end", 1, killed=False) for number in range(len(runs))]
            for turn in [*turns, *in_order]:
                run = runs[turn.run % len(runs)]
                run.go_on(turn.until, turn.times)
                if turn.killed:
                    run.kill()
                before, keys = (keys, judged), read_keys(cache)
                judged = keys | read_waiting(cache)
                assert before[0] <= keys, "rows that were there have gone"
                assert before[1] <= judged, "the teacher's answers have gone before they were used"
        finally:
            for run in runs:
                run.kill()

        rows, sets = read_rows(cache), read_sets(cache)
        assert rows.items() <= expected_rows.items()
        allowed: dict[str, ResponseSet] = {}
        for job, run in zip(jobs, runs, strict=False):
            own_sets, own_rows = alone_as(job, reference)
            allowed |= own_sets
            if run.report is not None:
                assert own_sets.keys() <= sets.keys(), "a run ended without its response sets"
                assert own_rows.keys() <= rows.keys(), "a run ended without its rows"
        check_same_sets(sets, {name: allowed[name] for name in sets})  # a killed run may have left its own, too

        waiting = read_waiting(cache)
        rerun = Run(whole, cache, reference)
        rerun.go_on()
        missing = expected_rows.keys() - rows.keys()
        asked = [key for role, key in rerun.asked if role == "teacher"]
        assert sorted(asked) == sorted(missing - waiting)
        asked = [key for role, key in rerun.asked if role == "reference"]
        assert sorted(asked) == (sorted(missing) if reference else [])

        assert read_rows(cache) == expected_rows
        check_same_sets(read_sets(cache), sets | expected_sets)
        assert not list(cache.glob("scorings/*/pending/*"))
        assert not [path for path in cache.rglob("*") if path.name.startswith(".")]
        assert len(list((cache / "tokenizers").iterdir())) == 1


def test_samples_that_a_gc_removes_before_their_set_is_made_are_sampled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples of no set are garbage once they are a day old, also when a run has just counted on them."""
    job, cache, real = Job((0, 1, 2, 3), "sampled", 2), tmp_path / "cache", sample_responses
    gone: list[Path] = []

    def sample(*arguments: Any) -> None:
        real(*arguments)
        if not gone:
            gone.extend(cache.glob("samples/*/*"))
            gone[0].unlink()

    monkeypatch.setattr(stage, "sample_responses", sample)
    job.run(cache, None)
    check_same_sets(read_sets(cache), alone_as(job, None)[0])
    assert len(gone) > 1
