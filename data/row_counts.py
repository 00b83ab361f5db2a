"""Counts what happens to the rows of preference data. It needs neither a tokenizer nor a model."""

from collections import Counter
from dataclasses import dataclass, field

from adpa.data.sequences import TokenIds
from adpa.errors import DataError, RowError


@dataclass
class RowCounts:
    """What happened to the rows.

    Attributes:
        rows: rows read.
        invalid: rows that cannot be used, by reason.
        used: rows that became token ids.
        duplicates: rows in use whose prompt, responses, tools and template arguments are those of an earlier row.
        identical: rows in use whose two responses are the same tokens, maybe because both were cut.
        contradicting: rows in use that prefer what an earlier row with the same prompt rejects, and the reverse.
        truncated_prompts: prompts cut to the limit.
        thinking_left_out: rows whose earlier turns had thinking that the chat template leaves out.
    """

    rows: int = 0
    invalid: Counter[str] = field(default_factory=Counter)
    used: int = 0
    duplicates: int = 0
    identical: int = 0
    contradicting: int = 0
    truncated_prompts: int = 0
    thinking_left_out: int = 0

    _first: tuple[int, RowError] | None = field(default=None, init=False, repr=False)
    _occurrences: dict[str, int] = field(default_factory=dict, init=False, repr=False)
    _pairs: set[int] = field(default_factory=set, init=False, repr=False)  # hashes: a row takes few bytes

    @property
    def dropped(self) -> int:
        """Rows that cannot be used."""
        return self.invalid.total()

    def reasons(self) -> dict[str, int]:
        """``invalid`` by falling count."""
        return dict(sorted(self.invalid.items(), key=lambda item: (-item[1], item[0])))

    def add_invalid(self, number: int, error: RowError) -> None:
        """Counts a row that cannot be used, by its number."""
        self.invalid[error.reason] += 1
        if self._first is None or number < self._first[0]:
            self._first = number, error

    def add_used(self, example_id: str, prompt_ids: TokenIds, chosen_ids: TokenIds, rejected_ids: TokenIds) -> int:
        """Counts a row in use; a prompt alone has empty responses.

        Returns:
            The row's place among equal rows, from 1.
        """
        prompt, chosen, rejected = prompt_ids.tobytes(), chosen_ids.tobytes(), rejected_ids.tobytes()
        self.used += 1
        if chosen == rejected:
            self.identical += bool(chosen)
        else:
            self.contradicting += hash((prompt, rejected, chosen)) in self._pairs
            self._pairs.add(hash((prompt, chosen, rejected)))
        occurrence = self._occurrences[example_id] = self._occurrences.get(example_id, 0) + 1
        self.duplicates += occurrence > 1
        return occurrence

    def error(self) -> RowError:
        """The error of the first row that cannot be used; it counts the others."""
        assert self._first is not None
        error = self._first[1]
        if self.dropped == 1:
            return error
        problem, fix, reason = error.args
        return RowError(f"{problem} (first of {self.dropped:,} invalid rows; {self.describe()})", fix, reason)

    def nothing_left(self, source: str) -> DataError:
        """The error where every row of a source was dropped."""
        assert self._first is not None
        problem = f"{source}: found no row that can be used: dropped {self.dropped:,} ({self.describe()})"
        return DataError(f"{problem}; the first: {self._first[1].args[0]}", "mend the data")

    def describe(self) -> str:
        """The rows that cannot be used, by reason, as a part of a line."""
        return ", ".join(f"{reason}: {count:,}" for reason, count in self.reasons().items())
