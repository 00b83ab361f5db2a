"""The seeds of a study. Imports no torch."""

from collections import Counter
from typing import Any

from adpa.errors import OptionError
from adpa.pipeline.option_checks import LARGEST_SEED


def check_seeds(seeds: Any, where: str) -> tuple[int, ...]:
    """The seeds, after a check that they are different numbers.

    Raises:
        OptionError: the list is empty, or a seed is no number or occurs twice.
    """
    if not isinstance(seeds, list) or not all(type(seed) is int and 0 <= seed <= LARGEST_SEED for seed in seeds):
        raise OptionError(f"{where}: {seeds!r}; expected a list of numbers of at least 0 and at most {LARGEST_SEED}")
    if not seeds:
        raise OptionError(f"{where}: {seeds!r}; expected at least one")
    twice = [seed for seed, count in Counter(seeds).items() if count > 1]
    if twice:
        raise OptionError(f"{where}: seed {twice[0]} occurs twice", "name every seed once")
    return tuple(seeds)
