"""Notices another process that does the work of this run at the same time.

Before a run writes a batch, it lists the folder again. A new shard may be another part's, or one that ``adpa cache
pack`` wrote. It tells of the same work only if it has a row that this run has still to write.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from adpa.data.cache.locations import Location
from adpa.data.cache.shards import list_shards, peek_keys
from adpa.errors import CacheError

logger = logging.getLogger(__name__)

LISTED_AT_ONCE = 1000  # names; an object store takes one request for them
MOST_READ = 16  # new shards at a time: those of other parts may be many


class Keyed(Protocol):
    """Something that gets a row of its own in the cache."""

    @property
    def key(self) -> bytes:
        """The key of the row."""
        ...


@dataclass(frozen=True)
class Written:
    """What came of a batch.

    Attributes:
        name: the shard that was written; empty if another process had finished all its rows.
        keys: the keys of its rows.
        bytes: its size; 0 if nobody asks for it.
        doubled: whether another process does the same work.
    """

    name: str = ""
    keys: Collection[bytes] = ()
    bytes: int = 0
    doubled: bool = False


class Alarm:
    """Warns of another process that does the same work, once in a run."""

    def __init__(self) -> None:
        self._raised = False

    def __call__(self, cache: Location, work: str) -> None:
        """Warns, unless it has already. ``work`` is what the other process does too."""
        if not self._raised:
            self._raised = True
            logger.warning(
                "%s: another process %s at the same time, so that the work is done twice; stop one of the two, or "
                "share the work: --part 1/2 for one, --part 2/2 for the other",
                cache,
                work,
            )


class Watch:
    """Watches the folders into which another process that does the same work would write, from now on.

    Args:
        folders: each folder with the beginning of its shards' names.
        alarm: is called when another process does the same work. A worker on a cluster cannot warn: its results say it.
    """

    def __init__(self, folders: Sequence[tuple[Location, str]], alarm: Callable[[], None]) -> None:
        self._folders, self._alarm = folders, alarm
        self._seen = set(self._list())
        self._pause = self._strangers = 0
        self._noticed = False

    def over(
        self, batches: Sequence[Sequence[Keyed]], writes: Iterable[Callable[[], Written]]
    ) -> Iterator[Callable[[], Written]]:
        """The callbacks that write the batches, each with a look before it."""
        waiting = {item.key for batch in batches for item in batch}
        self._pause = 0
        if self._look(waiting):  # while the model was loaded; in a worker, these may be the rows of a dead worker
            self._alarm()
            self._noticed = False
        for write in writes:
            yield partial(self._write, write, waiting)

    def _write(self, write: Callable[[], Written], waiting: set[bytes]) -> Written:
        doubled = self._look(waiting)
        if doubled:
            self._alarm()
        written = write()
        self._seen.add(written.name)
        waiting.difference_update(written.keys)
        return replace(written, doubled=doubled)

    def _look(self, waiting: Set[bytes]) -> bool:
        """Whether another process has written a row that waits here; false after the first time.

        A look costs little: many names, or shards with other rows, delay the next one.
        """
        self._pause -= 1
        if self._noticed or self._pause >= 0:
            return False
        paths = self._list()
        new = sorted(paths.keys() - self._seen)
        self._seen |= paths.keys()
        self._noticed = any(not waiting.isdisjoint(_read_keys(paths[name])) for name in new[:MOST_READ])
        self._strangers += bool(new)
        self._pause = max(len(paths) // LISTED_AT_ONCE, 2**self._strangers - 1 if new else 0)
        return self._noticed

    def _list(self) -> dict[str, Location]:
        return {path.name: path for folder, prefix in self._folders for path in list_shards(folder, prefix)}


def _read_keys(path: Location) -> list[bytes]:
    keys: list[bytes] = []
    with suppress(FileNotFoundError, CacheError):  # it was replaced; or it is damaged, and its readers will say so
        keys = peek_keys(path).to_pylist()
    return keys
