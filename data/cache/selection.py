"""Selects the response sets and the scoring of a cache that a run reads."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from operator import attrgetter
from typing import Any

from adpa.data.cache.choice import choose, last_time, options_of
from adpa.data.cache.format import check_cache
from adpa.data.cache.locations import Location
from adpa.data.cache.names import find_scoring, find_sets
from adpa.data.cache.responses import ResponseName, ResponseSet, read_response_sets
from adpa.data.cache.signals import Scoring, SignalTable, read_scorings, read_signals
from adpa.errors import CacheError, ListedError


@dataclass(frozen=True)
class Need:
    """Whether a run needs the signals of a response set, and advantages among them, beside its tokens."""

    signals: bool
    advantages: bool


@dataclass(frozen=True)
class TrainingSet:
    """A response set in training, and its signals if a term needs them."""

    responses: ResponseSet
    signals: SignalTable | None


@dataclass(frozen=True)
class Selection:
    """The response sets that a run reads, by name, and the scoring that has every row that it needs.

    Attributes:
        sets: the response sets.
        scoring: the scoring; none if no signals are needed.
        signals: its rows.
        newest_of: the number of versions that fit, of which this is the newest.
    """

    sets: dict[ResponseName, ResponseSet]
    scoring: Scoring | None
    signals: SignalTable | None
    newest_of: int = 1

    @property
    def ids(self) -> dict[str, Any]:
        """The ids of the sets and of the scoring."""
        return {
            "scoring": self.scoring.id if self.scoring else None,
            "responses": {name: responses.id for name, responses in self.sets.items()},
        }

    def training_sets(self, needs: Mapping[ResponseName, Need]) -> list[TrainingSet]:
        """The training sets, in the order of ``needs``."""
        return [TrainingSet(self.sets[name], self.signals if need.signals else None) for name, need in needs.items()]


@dataclass(frozen=True)
class ScoredSet:
    """A response set, and a scoring that has the signals of all its responses; ``newest_of`` as in ``Selection``."""

    responses: ResponseSet
    scoring: Scoring
    signals: SignalTable
    newest_of: int = 1

    @property
    def sets(self) -> dict[ResponseName, ResponseSet]:
        """The set by its name."""
        return {self.responses.info.name: self.responses}

    def describe(self) -> str:
        """One line for a user who has to choose among scored sets."""
        return f"{self.responses.describe()} with scoring {self.scoring.describe()}"


def select(
    cache: Location,
    needs: Mapping[ResponseName, Need],
    student: str,
    scoring: str | None = None,
    response_sets: Sequence[str] = (),
    earlier: Mapping[str, Any] = {},  # only read
    held_out: Collection[str] = (),
) -> Selection:
    """Finds the combination of response sets and scoring that has everything: the one that fits, or the newest version.

    Args:
        cache: the cache's directory.
        needs: the needs of the run, by response set.
        student: digest of the student's weights; sampled responses must be its own.
        scoring: the scoring to use, as ``find_scoring`` takes it; default: the one that fits.
        response_sets: the response sets to use, each as ``find_sets`` takes it; of a name without one, all.
        earlier: the ``ids`` of the run that this one resumes: they go before newer ones.
        held_out: ids of response sets that are not trained on.

    Raises:
        CacheError: no combination fits, several do that are not versions of one data set, or the newest version lacks
            something.
        DamagedFileError: a file of the cache is damaged.
    """
    check_cache(cache)
    every = [one for one in read_response_sets(cache) if one.id not in held_out]
    present = _narrow(every, list(needs), response_sets)
    usable = [one for one in present if one.info.sampling is None or one.info.sampling.student == student]
    groups = complete_groups(usable, list(needs))
    if not groups:
        raise _missing_sets(cache, present, usable, list(needs), student)
    fitting = [Selection(group, None, None) for group in groups]
    lacks: list[tuple[Selection, str]] = []
    if any(need.signals for need in needs.values()):
        fitting, lacks = _scored(cache, groups, named_scorings(cache, scoring), needs)
    if again := [one for one in fitting if one.ids == earlier]:
        return again[0]
    selection = choose(fitting)
    if len(present) == sum(one.info.name in needs for one in every):  # the user named none of them
        _check_nothing_is_newer(cache, selection, usable, lacks)
    return replace(selection, newest_of=len(fitting))


def _scored(
    cache: Location,
    groups: Sequence[dict[ResponseName, ResponseSet]],
    scorings: Sequence[Scoring],
    needs: Mapping[ResponseName, Need],
) -> tuple[list[Selection], list[tuple[Selection, str]]]:
    """The groups with the scorings that fit; the others with the reason why they do not."""
    tables = {entry.id: read_signals(cache, entry) for entry in scorings}
    pairs = [Selection(group, entry, tables[entry.id]) for group in groups for entry in scorings]
    lacks = [
        (one, f"scoring {one.scoring.id} {reason}")
        for one in pairs
        if one.scoring and one.signals and (reason := missing_signals(one.sets, one.scoring, one.signals, needs))
    ]
    if len(lacks) == len(pairs):
        problem = f"{cache}: no scoring has the signals that are needed"
        fix = "run adpa precompute with these responses, and with --reference for advantages"
        if len(reasons := {lack for _, lack in lacks}) == 1:
            raise CacheError(f"{problem}: {reasons.pop()}", fix)
        named = [(", ".join(each.shard_prefix() for each in one.sets.values()), lack) for one, lack in lacks]
        raise _found(problem, fix, [f"{sets}: {lack}" for sets, lack in named])
    refused = [id(one) for one, _ in lacks]
    return [one for one in pairs if id(one) not in refused], lacks


def _check_nothing_is_newer(
    cache: Location, selection: Selection, usable: Sequence[ResponseSet], lacks: Sequence[tuple[Selection, str]]
) -> None:
    """Checks that the data has no newer version that is unfinished: nobody should train on the older one unawares."""
    recipes = [one.recipe for one in selection.sets.values() if one.record]
    newest = max((one for one in usable if one.recipe in recipes), key=attrgetter("time"), default=None)
    if newest is None or newest.time <= last_time(selection):
        return
    reasons = [lack for one, lack in lacks if newest in one.sets.values()]
    missing = " and ".join(name for name in selection.sets if name != newest.info.name)
    record = newest.record.describe() if newest.record else ""
    raise CacheError(
        f"{cache}: {newest.shard_prefix()}, from {record}, is newer than the responses that fit, but "
        + (", ".join(reasons) or f"the cache has no {missing} responses that go with it"),
        f"finish it with the same adpa precompute, or take the older ones with {options_of(selection)}",
    )


def select_scored(
    cache: Location, scoring: str | None = None, response_set: str | None = None
) -> tuple[list[ScoredSet], list[str]]:
    """Finds every response set with every scoring that has all its signals.

    Args:
        cache: the cache's directory.
        scoring: the scoring, as ``find_scoring`` takes it; others are ignored.
        response_set: the response set or sets, as ``find_sets`` takes them; others are ignored.

    Returns:
        The scored sets, and a line about each set that no scoring covers whole.

    Raises:
        CacheError: no set or scoring fits.
        DamagedFileError: a file of the cache is damaged.
    """
    check_cache(cache)
    present = list(read_response_sets(cache))
    if not present:
        raise CacheError(f"{cache}: found no response sets", "make some with adpa precompute")
    matching = present if response_set is None else find_sets(response_set, present)
    tables = [(entry, read_signals(cache, entry)) for entry in named_scorings(cache, scoring)]
    scored, left_out = [], []
    for responses in matching:
        name = responses.info.name
        lacks = [missing_signals({name: responses}, entry, table, {name: Need(True, False)}) for entry, table in tables]
        scored += [ScoredSet(responses, *pair) for pair, lack in zip(tables, lacks, strict=True) if not lack]
        if all(lacks):
            reasons = ", ".join(f"scoring {entry.id} {lack}" for (entry, _), lack in zip(tables, lacks, strict=True))
            left_out.append(f"{responses.describe()}: {reasons}")
    if not scored:
        raise _found(
            f"{cache}: no response set has the signals of all its responses",
            "finish scoring with the same adpa precompute",
            left_out,
        )
    return scored, left_out


def select_one_scored(
    cache: Location, scoring: str | None = None, response_set: str | None = None
) -> tuple[ScoredSet, list[str]]:
    """Finds the response set with the scoring that has all its signals: the one that fits, or the newest version.

    The arguments are those of ``select_scored``.

    Raises:
        CacheError: none fits, or several do that are not versions of one data set.
        DamagedFileError: a file of the cache is damaged.
    """
    scored, left_out = select_scored(cache, scoring, response_set)
    return replace(choose(scored), newest_of=len(scored)), left_out


def named_scorings(cache: Location, scoring: str | None) -> list[Scoring]:
    """The scorings of a cache: the one that a user named, as ``find_scoring`` takes it, or all.

    Raises:
        CacheError: there are none, or none fits.
    """
    scorings = list(read_scorings(cache))
    if not scorings:
        raise CacheError(f"{cache}: found no scorings", "make one with adpa precompute")
    return scorings if scoring is None else [find_scoring(scoring, scorings)]


def _narrow(
    present: Sequence[ResponseSet], needed: Sequence[ResponseName], response_sets: Sequence[str]
) -> list[ResponseSet]:
    """Keeps the sets that are needed and that the user named; of a name for which he named none, all."""
    kept = {name: [one for one in present if one.info.name == name] for name in needed}
    for text in response_sets:
        fitting = find_sets(text, present)
        name = fitting[0].info.name
        if name not in kept:
            raise CacheError(
                f"--response-set {text}: {fitting[0].describe()}; this run reads {' and '.join(needed)} responses",
                "leave it out, or choose another objective or --on",
            )
        ids = {one.id for one in fitting}
        left = [one for one in kept[name] if one.id in ids]
        if not left:
            raise CacheError(
                f"--response-set {text}: another {name} set was named before it: {kept[name][0].describe()}",
                f"name one {name} set",
            )
        kept[name] = left
    return [one for sets in kept.values() for one in sets]


def complete_groups(
    usable: Sequence[ResponseSet], names: Sequence[ResponseName]
) -> list[dict[ResponseName, ResponseSet]]:
    """Every combination of one set of each name, all made from the same examples in the same way."""
    by_origin: dict[tuple[object, ...], dict[ResponseName, list[ResponseSet]]] = defaultdict(lambda: defaultdict(list))
    for responses in usable:
        info = responses.info
        by_origin[info.examples, info.encoding][info.name].append(responses)
    return [
        dict(zip(names, combination, strict=True))
        for sets in by_origin.values()
        if sets.keys() >= set(names)
        for combination in product(*(sets[name] for name in names))
    ]


def _missing_sets(
    cache: Location,
    present: Sequence[ResponseSet],
    usable: Sequence[ResponseSet],
    names: Sequence[ResponseName],
    student: str,
) -> CacheError:
    """The error where no group is complete."""
    for name in names:
        if not any(one.info.name == name for one in usable):
            whose = f" of this student ({student[:8]})" if name == "sampled" else ""
            return _found(
                f"{cache}: the cache has no {name} responses{whose}",
                "run adpa precompute " + ("with --student" if name == "sampled" else f"--responses {name}"),
                [one.describe() for one in present if one.info.name == name],
            )
    return _found(
        f"{cache}: the cache has no {' and '.join(names)} responses made from the same data with the same tokenizer "
        "and limits",
        "run adpa precompute on one data set with one set of options",
        [one.describe() for one in usable],
    )


def _found(problem: str, fix: str, found: Sequence[str]) -> CacheError:
    """An error with what was found instead: one thing in its line, several as a list."""
    if len(found) > 1:
        return ListedError(problem, f"{fix}; found", *found)
    return CacheError("; found ".join([problem, *found]), fix)


def missing_signals(
    group: Mapping[ResponseName, ResponseSet], scoring: Scoring, table: SignalTable, needs: Mapping[ResponseName, Need]
) -> str:
    """The reason why a scoring does not fit, as the end of a sentence; empty if it fits."""
    for name, need in needs.items():
        if not need.signals:
            continue
        if group[name].info.vocabulary != scoring.vocabulary:
            return "has another vocabulary"
        if need.advantages and scoring.reference is None:
            return "has no reference, hence no advantages"
        present = table.locate(group[name].table["key"]) >= 0
        if not present.all():
            return f"has {present.sum()} of {len(present)} {name} responses"
    return ""
