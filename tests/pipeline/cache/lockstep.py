"""Whole runs of ``precompute``, ``cache gc`` and ``cache pack`` in lock-step: of their threads, one moves at a time.

A run can stop before a model answers a batch, and before a file of the cache is opened for writing, appears, vanishes,
is listed or is read. The models are no networks, but say of a sequence what its key says.
"""

import json
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from adpa import precompute
from adpa.data.cache.compact import compact_schema
from adpa.data.cache.format import prepare_cache
from adpa.data.cache.samples import SampleRequest
from adpa.data.cache.signal_rows import SignalRow
from adpa.data.cache.signals import ModelIdentity, Scoring
from adpa.data.sequences import TokenIds, TokenSequence
from adpa.pipeline.cache.gc import collect_garbage
from adpa.pipeline.cache.pack import pack_cache, pack_folder
from adpa.pipeline.precompute import PrecomputeReport
from adpa.pipeline.scoring.score import Batch, ReferenceLogprobs

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
    """The examples of a run of ``precompute``, and whether its writing thread is slow."""

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
    """A command on the cache that may run at the same time."""

    command: str
    writes_late = False

    def run(self, cache: Path, reference: str | None) -> None:
        """The real command; it first makes the cache if no run has made it yet."""
        prepare_cache(cache)
        if self.command == "gc":
            collect_garbage(cache, yes=True)
        else:
            pack_cache(cache)


@dataclass(frozen=True)
class Pack:
    """Packing the rows of a scoring into files of a size in bytes."""

    scoring: Scoring
    goal: int
    writes_late = False

    def run(self, cache: Path, reference: str | None) -> None:
        """The real work on one folder."""
        schema = compact_schema(self.scoring.top_k, self.scoring.lossy)
        pack_folder(self.scoring.folder(cache), "signals", schema, lambda table: iter([table]), self.goal)


OPERATIONS = {"open": os, "rename": os, "listdir": os, "read_bytes": Path, "unlink": Path, "rmdir": Path}
STOPS = ("answer", *OPERATIONS)


@dataclass(frozen=True)
class Turn:
    """One run goes on to the nth operation of a kind, on a path that contains ``at``; it may be killed there."""

    run: int
    until: str
    times: int
    killed: bool
    at: str = ""


class Run(threading.Thread):
    """A job or chore in a thread that moves only on command, and only to its next stop."""

    by_thread: ClassVar[dict[int, "Run"]] = {}

    def __init__(self, work: Job | Chore | Pack, cache: Path, reference: str | None) -> None:
        super().__init__(daemon=True)
        self.work, self.cache, self.reference = work, cache, reference
        self.requested: list[tuple[str, bytes]] = []
        self.report: PrecomputeReport | None = None
        self.error: BaseException | None = None
        self.killed = self.over = False
        self._before = self._path = ""
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

    def stop(self, before: str, path: str) -> None:
        """Waits, in the run's own thread, until it may go on."""
        if not self.killed:  # else the exception is on its way
            self._before, self._path = before, path
            self._stands.release()
            self._wait()

    def go_on(self, until: str = "its end", times: int = 1, at: str = "") -> None:
        """Lets the run go on, and waits until it is at the operation, or has ended."""
        while not self.over and times > 0:
            self._go.release()
            assert self._stands.acquire(timeout=PATIENCE), "a run hangs"
            times -= self._before == until and at in self._path
        if self.error is not None:
            raise self.error

    def kill(self) -> None:
        """Ends the run at its stop."""
        self.killed = self.killed or not self.over
        self._go.release()
        self.join(PATIENCE)

    def _wait(self) -> None:
        if not self._go.acquire(timeout=PATIENCE) or self.killed:
            self.killed = True
            raise Killed


def take_turns(runs: Sequence[Run], turns: Iterable[Turn]) -> Generator[None, None, None]:
    """Moves the runs turn by turn, then each to its end; yields after every turn. Closing it kills them."""
    in_order = [Turn(number, "its end", 1, killed=False) for number in range(len(runs))]
    try:
        for turn in [*turns, *in_order]:
            run = runs[turn.run % len(runs)]
            run.go_on(turn.until, turn.times, turn.at)
            if turn.killed:
                run.kill()
            yield
    finally:
        for run in runs:
            run.kill()


def stop(before: str, path: object = "") -> None:
    """Lets another run move; does nothing in other threads, or for files outside the cache."""
    run = Run.by_thread.get(threading.get_ident())
    if run is not None and (before == "answer" or str(path).startswith(str(run.cache))):
        run.stop(before, str(path).removeprefix(str(run.cache)))


def note_requested(model: str, keys: Iterable[bytes]) -> None:
    run = Run.by_thread.get(threading.get_ident())
    if run is not None:
        run.requested += [(model, key) for key in keys]


class Write:
    """A batch that is to be written."""

    def __init__(self, write: Callable[[], object]) -> None:
        self._write: Callable[[], object] | None = write

    def result(self) -> None:
        write, self._write = self._write, None
        if write is not None:
            write()


class Writer:
    """The writing thread of ``write_batches`` as part of the run's steps: it writes at once, or as late as possible."""

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
    """A ``Scorer`` and ``Sampler`` whose answers depend on the keys alone. T tokens, K ids."""

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
        note_requested(self._name, keys)

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


@contextmanager
def models_and_steps() -> Iterator[None]:
    """Replaces models by oracles, and makes runs stop before file operations."""
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<end>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, chat_template=TEMPLATE, **special)

    def open_checkpoint(name: str, **_: object) -> SimpleNamespace:
        return SimpleNamespace(
            name=name,
            identity=ModelIdentity(name, None, f"{name}'s weights"),
            tokenizer=tokenizer,
            config=SimpleNamespace(vocab_size=len(VOCABULARY)),
            dtype_name=lambda _: "float32",
            eos_token_ids=(),
            check_positions=lambda _: None,
            check_ids=lambda _: None,
            check_here=lambda: None,
        )

    def open_oracle(checkpoint: SimpleNamespace, *_: object) -> Oracle:
        return Oracle(checkpoint.name)

    engine = SimpleNamespace(
        name="oracle",
        sampling_name="oracle",
        reason="a test",
        max_tokens=None,
        extra_positions=0,
        gpus=0,
        open_scorer=open_oracle,
        open_sampler=open_oracle,
    )

    def stopping(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def stop_first(path: Any, *arguments: Any, **options: Any) -> Any:
            stop(name, path)
            return operation(path, *arguments, **options)

        return stop_first

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("adpa.pipeline.scoring.inputs.check_models", lambda _: None)
        patch.setattr("adpa.pipeline.scoring.opened_models.open_checkpoint", open_checkpoint)
        patch.setattr("adpa.pipeline.scoring.plan.choose_engine", lambda *_: engine)
        patch.setattr("adpa.pipeline.scoring.jobs.ThreadPoolExecutor", Writer)
        for name, owner in OPERATIONS.items():
            patch.setattr(owner, name, stopping(name, getattr(owner, name)))
        patch.setattr(os, "fsync", lambda _: None)  # no test here cuts the power
        yield
