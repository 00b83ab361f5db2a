"""The numbers of a training run, each with its range. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, isfinite
from numbers import Integral, Real
from typing import Any

from adpa.errors import OptionError

LARGEST_COUNT = 2**31 - 1
LARGEST_SEED = 2**32 - 1  # of NumPy


@dataclass(frozen=True)
class Range:
    """The numbers that an option can have.

    Attributes:
        least: the smallest one.
        most: the largest one.
        whole: whether they are whole numbers.
        above: whether ``least`` itself is too small.
        below: whether ``most`` itself is too large.
        fix: what to do about another number.
    """

    least: float = 0
    most: float = inf
    whole: bool = False
    above: bool = False
    below: bool = False
    fix: str = ""

    def check(self, name: str, value: Any) -> None:
        """Checks a value.

        Args:
            name: what the error calls it, such as ``--seed`` or ``--set seed=``.
            value: the value.

        Raises:
            OptionError: it is no such number.
        """
        name += "" if name.endswith("=") else " "
        if isinstance(value, bool) or not isinstance(value, Real):
            raise OptionError(f"{name}{value!r}; expected a number")
        value = float(value) if not isinstance(value, Integral) else int(value)
        if self.whole and not isinstance(value, int):
            raise OptionError(f"{name}{value:g}; expected a whole number", self.fix)
        low = value <= self.least if self.above else value < self.least
        high = value >= self.most if self.below else value > self.most
        if low or high or not isfinite(value):
            shown = value if self.whole else f"{value:g}"
            expected = "a finite number" if value == inf else self._bounds(high)
            raise OptionError(f"{name}{shown}; expected {expected}", self.fix)

    def _bounds(self, high: bool) -> str:
        """The bounds in words; a bound that only keeps numbers small is there for who exceeds it."""
        least = f"more than {self.least:g}" if self.above else f"at least {self.least:g}"
        most = f"{'less than' if self.below else 'at most'} {self.most:.15g}"
        if self.most == inf:
            return least if self.above else f"{self.least:g} or more"
        if self.most >= LARGEST_COUNT:
            return most if high else least
        return f"{least} and {most}"


NO_LIMIT = -1
AT_LEAST_0 = Range()
MORE_THAN_0 = Range(above=True)
COUNT = Range(1, LARGEST_COUNT, whole=True)
COUNT_OR_0 = Range(0, LARGEST_COUNT, whole=True)
SEED = Range(0, LARGEST_SEED, whole=True)
SHARE_BELOW_1 = Range(0, 1, below=True)

RANGES = {
    "kl_weight": AT_LEAST_0,
    "advantage_weight": AT_LEAST_0,
    "plausibility": SHARE_BELOW_1,
    "lora_rank": COUNT,
    "learning_rate": MORE_THAN_0,
    "num_train_epochs": Range(0, LARGEST_COUNT, above=True),
    "max_steps": Range(1, LARGEST_COUNT, whole=True, fix="leave it out for no limit"),
    "batch_size": COUNT,
    "micro_batch_size": COUNT,
    "warmup_steps": Range(0, LARGEST_COUNT),
    "weight_decay": AT_LEAST_0,
    "max_grad_norm": AT_LEAST_0,
    "seed": SEED,
    "logging_steps": COUNT,
    "save_steps": COUNT_OR_0,
}


def check_values(values: Mapping[str, Any]) -> None:
    """Checks the numbers among the options of ``distill``; None, and what is no number, is left to others.

    Raises:
        OptionError: a number is outside of its range.
    """
    for name, value in values.items():
        if name in RANGES and value is not None and not (name == "max_steps" and value == NO_LIMIT):
            RANGES[name].check(f"--{name.replace('_', '-')}", value)
    warmup_steps = values.get("warmup_steps", 0)
    if warmup_steps >= 1 and warmup_steps != int(warmup_steps):
        raise OptionError(f"--warmup-steps {warmup_steps:g}; expected a whole number, or a share of all steps below 1")
