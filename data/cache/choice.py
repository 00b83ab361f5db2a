"""Chooses one of several combinations of response sets and scoring: the newest version, or the user chooses."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

from adpa.data.cache.responses import ResponseName, ResponseSet
from adpa.data.cache.signals import Scoring
from adpa.errors import ListedError


class Combination(Protocol):
    """Response sets by name, and the scoring that has their signals; none if they need no signals."""

    @property
    def sets(self) -> Mapping[ResponseName, ResponseSet]: ...

    @property
    def scoring(self) -> Scoring | None: ...


Fitting = TypeVar("Fitting", bound=Combination)


def are_versions(fitting: Sequence[Combination]) -> bool:
    """Whether combinations differ in nothing but their age: the same data, which has changed, and the same options."""
    first, *others = [_recipe(one) for one in fitting]
    return None not in first and all(one == first for one in others)


def options_of(combination: Combination) -> str:
    """The options that choose a combination, to copy."""
    scoring = combination.scoring
    sets = [f"--response-set {one.shard_prefix()}" for one in combination.sets.values()]
    return " ".join([*sets, *([] if scoring is None else [f"--scoring {scoring.id}"])])


def choose(fitting: Sequence[Fitting], options: Callable[[Combination], str] = options_of) -> Fitting:
    """The one combination that fits, or the newest if all are versions of one data set.

    Args:
        fitting: the combinations.
        options: the options that choose one of them, in words.

    Raises:
        ListedError: several fit that differ in more.
    """
    ordered = sorted(fitting, key=last_time, reverse=True)
    if len(ordered) == 1 or are_versions(ordered):
        return ordered[0]
    raise ListedError(
        f"{len(ordered)} combinations of responses and scoring fit",
        "choose one by the options at the end of its line",
        *_lines(ordered, options),
    )


def last_time(combination: Combination) -> str:
    """The latest time in the records of the sets; empty without any."""
    return max(one.time for one in combination.sets.values())


def made_from(combination: Combination, newest_of: int) -> str:
    """The data of the sets and the latest time in words; with the number of versions, if several fit."""
    if None in (records := [one.record for one in combination.sets.values()]):
        return "not recorded"
    by_source = {one.source: one for one in sorted(filter(None, records), key=lambda one: one.time)}
    data = " and ".join(one.describe() for one in by_source.values())
    return data if newest_of == 1 else f"newest of {newest_of} sets made from {data}"


def _recipe(combination: Combination) -> list[object]:
    scoring = combination.scoring
    return [*(one.recipe for one in combination.sets.values()), "" if scoring is None else scoring.id]


def _lines(fitting: Sequence[Combination], options: Callable[[Combination], str]) -> list[str]:
    """A line for each combination: its responses and their data, what else differs, the options."""
    facts = [_facts(one) for one in fitting]
    differing = [number for number, values in enumerate(zip(*facts, strict=True)) if len({*values}) > 1]
    return [
        ", ".join(fact for number, fact in enumerate(of_one) if fact and (number < 2 or number in differing))
        + f": {options(one)}"
        for of_one, one in zip(facts, fitting, strict=True)
    ]


def _facts(combination: Combination) -> list[str]:
    sets, scoring = list(combination.sets.values()), combination.scoring
    info = sets[0].info
    return [
        " and ".join(f"{len(one):,} {one.info.name}" for one in sets) + " responses",
        f"from {made_from(combination, 1)}" if all(one.record for one in sets) else "data not recorded",
        ", ".join(one.sampled for one in sets if one.sampled),
        ", ".join(info.rendering) or "the usual rendering",
        f"max prompt length {info.max_prompt_length}",
        f"max length {info.max_length}",
        f"tokenizer {info.tokenizer[:8]}",
        f"chat template {info.chat_template[:8]}",
        f"end of turn {info.turn_end}",
        "" if scoring is None else scoring.settings,
    ]
