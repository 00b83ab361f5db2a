"""The record of a response set: the data that it was made from, and when.

It is no part of the set's id, and lies under its own key of the metadata. Older sets have none.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta

KEY = "run"
STEP = timedelta(microseconds=1)


@dataclass(frozen=True)
class SetRecord:
    """The data that a response set was made from, and when.

    Attributes:
        data: the absolute path of the data, or its name on the Hub.
        split: the split that was named.
        time: when a run read the data last, as ISO 8601 in UTC with microseconds.
    """

    data: str
    split: str | None
    time: str

    @property
    def source(self) -> str:
        """The data in words, without characters that could control a terminal."""
        text = self.data if self.split is None else f"{self.data} split {self.split}"
        return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)

    def describe(self) -> str:
        """The data and the time in words: ``/data/prefs.jsonl (2026-11-28 14:02 UTC)``."""
        return f"{self.source} ({self.time[:16].replace('T', ' ')} UTC)"

    def serialize(self) -> str:
        """The record as JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    def after(self, latest: str) -> "SetRecord":
        """The record, with a time after ``latest``, that of another record: the clock of its machine may be ahead."""
        return self if self.time > latest else replace(self, time=_stamp(datetime.fromisoformat(latest) + STEP))


def make_record(data: str, split: str | None) -> SetRecord:
    """The record of data that is read now."""
    return SetRecord(data, split, _stamp(datetime.now(UTC)))


def read_record(metadata: Mapping[bytes, bytes] | None) -> SetRecord | None:
    """The record in the metadata of a set; none if it has none, or one of another form."""
    try:
        written = json.loads((metadata or {})[KEY.encode()])
        time = datetime.fromisoformat(written["time"])
        record = SetRecord(written["data"], written.get("split"), _stamp(time))
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError):
        return None
    typed = isinstance(record.data, str) and isinstance(record.split, str | None)
    return record if typed and time.tzinfo is not None and time.year < datetime.max.year else None


def _stamp(time: datetime) -> str:
    return time.astimezone(UTC).isoformat(timespec="microseconds")
