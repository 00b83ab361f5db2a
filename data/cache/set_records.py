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
        limit: the number of rows that were read at most.
        map: the columns that had other names in the data, as ``describe_map`` writes them.
    """

    data: str
    split: str | None
    time: str
    limit: int | None = None
    map: str | None = None

    @property
    def origin(self) -> tuple[object, ...]:
        """Everything but the time: what versions of one data set share."""
        return (self.data, self.split, self.limit, self.map)

    @property
    def source(self) -> str:
        """The data in words, without characters that could control a terminal."""
        text = self.data if self.split is None else f"{self.data} split {self.split}"
        text += "" if self.limit is None else f" limit {self.limit}"
        text += "" if self.map is None else f" map {self.map}"
        return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)

    def describe(self) -> str:
        """The data and the time in words: ``/data/prefs.jsonl (2026-11-28 14:02 UTC)``."""
        return f"{self.source} ({self.time[:16].replace('T', ' ')} UTC)"

    def serialize(self) -> str:
        """The record as JSON; what was not asked for is left out, except for the split."""
        fields = {name: value for name, value in asdict(self).items() if value is not None or name == "split"}
        return json.dumps(fields, sort_keys=True)

    def after(self, latest: str) -> "SetRecord":
        """The record, with a time after ``latest``, that of another record: the clock of its machine may be ahead."""
        return self if self.time > latest else replace(self, time=_stamp(datetime.fromisoformat(latest) + STEP))


def make_record(data: str, split: str | None, limit: int | None = None, map: str | None = None) -> SetRecord:
    """The record of data that is read now."""
    return SetRecord(data, split, _stamp(datetime.now(UTC)), limit, map)


def read_record(metadata: Mapping[bytes, bytes] | None) -> SetRecord | None:
    """The record in the metadata of a set; none if it has none, or one of another form."""
    try:
        written = json.loads((metadata or {})[KEY.encode()])
        time = datetime.fromisoformat(written["time"])
        asked = [written.get(name) for name in ("limit", "map")]
        record = SetRecord(written["data"], written.get("split"), _stamp(time), *asked)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError):
        return None
    typed = isinstance(record.data, str) and all(isinstance(one, str | None) for one in (record.split, record.map))
    typed = typed and isinstance(record.limit, int | None)
    return record if typed and time.tzinfo is not None and time.year < datetime.max.year else None


def _stamp(time: datetime) -> str:
    return time.astimezone(UTC).isoformat(timespec="microseconds")
