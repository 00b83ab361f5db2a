"""The errors that adpa raises for mistakes in its input.

Every message says what is wrong and where, what was expected, and what to do. The classes pickle (their arguments are
strings), so that they cross process boundaries.
"""

from collections.abc import Iterable
from difflib import SequenceMatcher

NEAR = 0.6  # of 1, as for difflib


class AdpaError(ValueError):
    """An error that the user can fix.

    Args:
        problem: what is wrong and where, and what was expected.
        fix: what to do.
    """

    exit_code = 2

    def __init__(self, problem: str, fix: str = "") -> None:
        super().__init__(problem, fix)

    def __str__(self) -> str:
        return "; ".join(part for part in self.args[:2] if part)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """What to do about an unknown name: the nearest known one as a question; empty if none is near.

    A name is near if it, or its beginning of this length, is much alike; of several, the shortest.
    """

    def likeness(one: str) -> tuple[float, int]:
        ratios = (SequenceMatcher(None, name, text).ratio() for text in (one, one[: len(name)]))
        return max(ratios), -len(one)

    nearest = max(known, key=likeness, default="")
    return f"did you mean {nearest}?" if name and likeness(nearest)[0] >= NEAR else ""


def first_line(error: BaseException) -> str:
    """The first line of what another package says of its error; what follows it is a trace or advice."""
    return str(error).strip().partition("\n")[0]


class OptionError(AdpaError):
    """An option, or a combination of options, that cannot be used."""


def empty_value(option: str, value: str) -> OptionError:
    """The error of an option whose value is empty, such as that of an unset variable of a shell."""
    return OptionError(f"{option} {value!r}: an empty value", "write one, or leave the option out")


class DataError(AdpaError):
    """Preference data that cannot be read or turned into tokens."""


class RowError(DataError):
    """A row that cannot be used, by its own fault. ``--drop-invalid`` leaves it out.

    Args:
        problem: as for every error; it begins with the place of the row.
        fix: what to do.
        reason: the kind of fault in a few words, under which a summary counts it.
    """

    def __init__(self, problem: str, fix: str = "", reason: str = "not a preference pair") -> None:
        super().__init__(problem, fix)
        self.args = (problem, fix, reason)  # all that pickling keeps
        self.reason = reason


class ModelError(AdpaError):
    """A checkpoint or tokenizer that cannot be used, alone or with the other models."""


class RemoteCodeError(ModelError):
    """A model or tokenizer that needs code from its repository, which the user has not allowed."""


class HeadError(ModelError):
    """A head that adpa cannot run itself: it does something unknown, or its weights are quantized."""


class CacheError(AdpaError):
    """A cache that lacks what a command needs, or that cannot be used."""


class ListedError(CacheError):
    """A cache error with a list of what the user can choose from.

    Args:
        problem: as for every error.
        fix: as for every error.
        lines: the list, which is printed below the error, one a line.
    """

    def __init__(self, problem: str, fix: str, *lines: str) -> None:
        super().__init__(problem, fix)
        self.args = (problem, fix, *lines)  # all that pickling keeps

    def __str__(self) -> str:
        first, *lines = (" ".join(line.split()) for line in (super().__str__(), *self.args[2:]))
        return "\n  ".join([f"{first}:", *lines]) if lines else first


class DamagedFileError(CacheError):
    """A cache file that differs from what was written."""

    exit_code = 1


class EngineError(AdpaError):
    """An inference engine that does not start, or fails during a run. Its earlier answers are kept."""

    exit_code = 1


class RankError(AdpaError):
    """A failure of one rank, which ends a run of several ranks."""

    exit_code = 1
