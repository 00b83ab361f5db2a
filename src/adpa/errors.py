"""What adpa raises when something is wrong with what it was given.

Every message says where and what was found, what was expected, and what to do about it. The classes
pickle (their arguments are the two strings), so that they cross process boundaries.
"""


class AdpaError(ValueError):
    """Something the user can put right.

    Args:
        problem: where it is, what was found and what was expected.
        fix: what to do about it.
    """

    exit_code = 2

    def __init__(self, problem: str, fix: str = "") -> None:
        super().__init__(problem, fix)

    def __str__(self) -> str:
        return "; ".join(part for part in self.args if part)


class OptionError(AdpaError):
    """An option, or a combination of options, that cannot be used."""


class DataError(AdpaError):
    """Preference data that cannot be read or turned into tokens."""


class ModelError(AdpaError):
    """A checkpoint or tokenizer that cannot be used, alone or with the others."""


class HeadError(ModelError):
    """A head that adpa cannot run itself: it does something unknown, or its weights are quantized."""


class CacheError(AdpaError):
    """A cache that does not hold what is asked of it."""


class DamagedFileError(CacheError):
    """A cache file whose bytes are not those that were written."""

    exit_code = 1


class EngineError(AdpaError):
    """An inference engine that does not start, or fails in the middle; what it answered before is kept."""

    exit_code = 1


class RankError(AdpaError):
    """A failure of one rank that ends a run of several."""

    exit_code = 1
