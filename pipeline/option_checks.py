"""Checks of the values of options, on the command line and in Python. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, isfinite
from numbers import Integral, Real
from typing import Any, get_args

from adpa.errors import OptionError, did_you_mean, empty_value

LARGEST_COUNT = 2**31 - 1
LARGEST_SEED = 2**32 - 1  # of NumPy
LEAST_TEMPERATURE = 1e-6  # logits are divided by it
DEVICES = ("cpu", "cuda", "mps", "xpu")


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
            raise OptionError(f"{name}{value}; expected a whole number", self.fix)
        low = value <= self.least if self.above else value < self.least
        high = value >= self.most if self.below else value > self.most
        if low or high or not isfinite(value):
            shown = value if self.whole else f"{value:g}"
            expected = "a finite number" if value == inf and self.most >= LARGEST_COUNT else self._bounds(high)
            raise OptionError(f"{name}{shown}; expected {expected}", self.fix)

    def _bounds(self, high: bool) -> str:
        """The bounds in words; a bound that only keeps numbers small is there for who exceeds it."""
        least = f"more than {self.least:g}" if self.above else f"at least {self.least:g}"
        most = f"{'less than' if self.below else 'at most'} {self.most}"
        if self.most == inf:
            return least if self.above else f"{self.least:g} or more"
        if self.most >= LARGEST_COUNT:
            return most if high else least
        return f"{least} and {most}"


AT_LEAST_0 = Range()
MORE_THAN_0 = Range(above=True)
COUNT = Range(1, LARGEST_COUNT, whole=True)
COUNT_OR_0 = Range(0, LARGEST_COUNT, whole=True)
SEED = Range(0, LARGEST_SEED, whole=True)
SAMPLING_SEED = Range(0, 2**63 - 1, whole=True)  # of torch and vLLM
SHARE = Range(0, 1, above=True)
SHARE_BELOW_1 = Range(0, 1, below=True)


def check_counts(options: Mapping[str, int | None]) -> None:
    """Checks that the values of options are whole numbers of at least 1; None is left to its default.

    Raises:
        OptionError: one is not.
    """
    for option, value in options.items():
        if value is not None:
            COUNT.check(option, value)


def check_shares(options: Mapping[str, float]) -> None:
    """Checks that the values of options are above 0 and at most 1.

    Raises:
        OptionError: one is not.
    """
    for option, value in options.items():
        SHARE.check(option, value)


def check_temperature(value: float) -> None:
    """Checks a sampling temperature: 0, or large enough to divide logits by it.

    Raises:
        OptionError: it is another value.
    """
    AT_LEAST_0.check("--temperature", value)
    if 0 < value < LEAST_TEMPERATURE:
        raise OptionError(f"--temperature {value:g}; expected at least {LEAST_TEMPERATURE:g}, or 0, which is greedy")


def check_choices(options: Mapping[str, tuple[str, Any]]) -> None:
    """Checks values against the names of their ``Literal`` types; the command line has done so already.

    Raises:
        OptionError: one is not among them.
    """
    for option, (value, names) in options.items():
        known = get_args(names)
        if value not in known:
            fix = did_you_mean(str(value), known)
            raise OptionError(f"{option} {value!r}; expected one of {', '.join(known)}", fix)


def check_not_empty(options: Mapping[str, str | None]) -> None:
    """Checks that no option has an empty value; None is left to its default.

    Raises:
        OptionError: one has.
    """
    for option, value in options.items():
        if value is not None and not value.strip():
            raise empty_value(option, value)


def check_device(device: str) -> None:
    """Checks the form of ``--device``; torch must say whether there is such a device.

    Raises:
        OptionError: it is no name of a device.
    """
    kind, colon, number = device.partition(":")
    numbered = not colon or (kind in ("cuda", "xpu") and number.isascii() and number.isdigit() and len(number) < 4)
    if device != "auto" and (kind not in DEVICES or not numbered):
        raise OptionError(
            f"--device {device or repr(device)}; expected auto, cpu, cuda, or cuda:1 for one of several GPUs"
        )
