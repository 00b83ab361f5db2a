"""Jobs of stage one: runs a model on batches and writes one shard for each batch. A killed run loses only open batches.

A batch is open while the model works on it or its shard is not yet written.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

from adpa.progress import progress

Item = TypeVar("Item")
Result = TypeVar("Result")
Item_contra = TypeVar("Item_contra", contravariant=True)
Result_co = TypeVar("Result_co", covariant=True)


class Job(Protocol[Item_contra, Result_co]):
    """The work of one model. Jobs can be pickled, so that other processes can run a part of the batches."""

    @property
    def counts(self) -> str:
        """Label of the progress bar: what it counts."""
        ...

    def size(self, item: Item_contra) -> int:
        """How far an item moves the progress bar."""
        ...

    def open(
        self,
    ) -> AbstractContextManager[Callable[[Sequence[Sequence[Item_contra]]], Iterator[Callable[[], Result_co]]]]:
        """Loads the model. Yields a function from batches to callbacks, each of which writes one result."""
        ...


class Executor(Protocol):
    """Runs jobs, in this process or in others."""

    def __call__(self, job: Job[Item, Result], batches: Sequence[Sequence[Item]]) -> list[Result]:
        """Runs a job on some batches and shows progress. Returns the callbacks' results in any order."""
        ...


def run_here(job: Job[Item, Result], batches: Sequence[Sequence[Item]]) -> list[Result]:
    """The ``Executor`` that runs jobs in this process."""
    results: list[Result] = []
    with job.open() as process:
        write_batches(job.counts, batches, job.size, process(batches), lambda write: results.append(write()))
    return results


def make_batches(items: Sequence[Item], size: Callable[[Item], int], batch_tokens: int) -> list[list[Item]]:
    """Groups items, largest first, so that number of items × largest size ≤ ``batch_tokens``.

    A larger item is a batch of its own.
    """
    batches: list[list[Item]] = []
    largest = 0
    for item in sorted(items, key=size, reverse=True):
        if not batches or (len(batches[-1]) + 1) * largest > batch_tokens:
            batches.append([])
            largest = size(item)
        batches[-1].append(item)
    return batches


def write_batches(
    description: str,
    batches: Sequence[Sequence[Item]],
    size: Callable[[Item], int],
    results: Iterable[Result],
    write: Callable[[Result], object],
) -> None:
    """Writes each batch's result while the next result is computed, and shows progress.

    Args:
        description: label of the progress bar.
        batches: the batches, in the order of their results.
        size: how far an item moves the progress bar.
        results: computes one result at each iteration.
        write: makes a result durable; runs in a thread of its own, one batch at a time.
    """
    total = sum(size(item) for batch in batches for item in batch)
    with progress(description, total) as advance, ThreadPoolExecutor(max_workers=1) as writer:
        writing: Future[object] | None = None
        for batch, result in zip(batches, results, strict=True):
            if writing is not None:
                writing.result()
            writing = writer.submit(write, result)
            advance(sum(size(item) for item in batch))
        if writing is not None:
            writing.result()
