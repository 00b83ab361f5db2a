"""Checks of the values of options, on the command line and in Python. Imports no torch."""

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from math import inf, isfinite
from numbers import Integral, Real
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, get_args, get_origin

from upath import UPath

from adpa.data.cache.locations import Location, find_location
from adpa.errors import OptionError, did_you_mean, empty_value
from adpa.pipeline.options import is_list, kind_of

LARGEST_COUNT = 2**31 - 1
LARGEST_SEED = 2**32 - 1  # of NumPy
LEAST_TEMPERATURE = 1e-6  # logits are divided by it
DEVICES = ("cpu", "cuda", "mps", "xpu")

Options = ParamSpec("Options")
Report = TypeVar("Report")


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


def takes_options(stage: Callable[Options, Report]) -> Callable[Options, Report]:
    """The stage with the types of its options checked: Python has no parser that did so.

    A path may be text, and text may be a path or a number. Numbers and choices are left to their own checks.

    Raises:
        OptionError: an option has a value of another type.
    """
    signature = inspect.signature(stage)

    @wraps(stage)
    def checked(*arguments: Options.args, **options: Options.kwargs) -> Report:
        bound = signature.bind(*arguments, **options)
        for name, value in bound.arguments.items():
            if get_origin(signature.parameters[name].annotation) is Annotated:
                bound.arguments[name] = _as_declared(signature.parameters[name], value)
        return stage(*bound.args, **bound.kwargs)

    return checked


def _as_declared(parameter: inspect.Parameter, value: Any) -> Any:
    kind, option = kind_of(parameter), f"--{parameter.name.replace('_', '-')}"
    may_be_none = NoneType in get_args(get_args(parameter.annotation)[0])
    if get_origin(kind) is Literal or kind in (int, float) or (value is None and may_be_none):
        return value
    if value is None:
        raise OptionError(f"{option} None: not a value", "write one, or leave the option out")
    if is_list(parameter):
        if not isinstance(value, list | tuple) or not all(isinstance(one, str | os.PathLike) for one in value):
            fix = f"write [{value!r}]" if isinstance(value, str) else ""
            raise OptionError(f"{option} {value!r}; expected a list of texts", fix)
        return [_from_text(kind, option, os.fspath(one)) for one in value]
    if kind is bool and not isinstance(value, bool):
        raise OptionError(f"{option} {value!r}; expected True or False")
    if kind is Mapping and not isinstance(value, Mapping):
        raise OptionError(f"{option} {value!r}; expected a mapping")
    if kind in (bool, Mapping) or (kind == Location and isinstance(value, UPath)):
        return value
    if isinstance(value, Real) and not isinstance(value, bool) and kind not in (Path, Location):
        return str(value)
    if not isinstance(value, str | os.PathLike):
        expected = "a path" if kind in (Path, Location) else "text"
        raise OptionError(f"{option} {value!r}; expected {expected}")
    return _from_text(kind, option, os.fspath(value))


def _from_text(kind: Any, option: str, text: str) -> Any:
    if kind not in (Path, Location):
        return text
    if not text.strip():
        raise empty_value(option, text)
    return find_location(text) if kind == Location else Path(text)
