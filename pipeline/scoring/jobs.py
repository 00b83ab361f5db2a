"""Batches of work whose results end up as shards: a killed run loses the batches in flight and no more."""

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
    """The work of one model on any batches. It can be pickled, so that other processes may share in it."""

    @property
    def counts(self) -> str:
        """What its progress bar counts."""
        ...

    def size(self, item: Item_contra) -> int:
        """What an item counts for the progress bar."""
        ...

    def open(
        self,
    ) -> AbstractContextManager[Callable[[Sequence[Sequence[Item_contra]]], Iterator[Callable[[], Result_co]]]]:
        """Loads the model. Yields a function from batches to callbacks, each of which writes one result."""
        ...


class Executor(Protocol):
    """Where jobs are done."""

    def __call__(self, job: Job[Item, Result], batches: Sequence[Sequence[Item]]) -> list[Result]:
        """Does a job on some batches, with a progress bar, and gives what writing each of them gave, in any order."""
        ...


def run_here(job: Job[Item, Result], batches: Sequence[Sequence[Item]]) -> list[Result]:
    """The ``Executor`` that is this process."""
    results: list[Result] = []
    with job.open() as ask:
        write_batches(job.counts, batches, job.size, ask(batches), lambda write: results.append(write()))
    return results


def make_batches(items: Sequence[Item], size: Callable[[Item], int], batch_tokens: int) -> list[list[Item]]:
    """Groups items so that their number × the largest size ≤ ``batch_tokens``, largest first.

    An item larger than that is a batch of its own.
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
    """Writes the result of each batch while the next one is being computed, and shows progress.

    Args:
        description: what the progress bar counts.
        batches: the batches, in the order of their results.
        size: what an item counts for the progress bar.
        results: computes the results as it is iterated.
        write: makes a result durable; runs in a thread of its own, for one batch at a time.
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
