"""Selects the response sets and the scoring of a cache that a run reads."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from adpa.data.cache.format import check_cache
from adpa.data.cache.locations import Location
from adpa.data.cache.names import find_scoring, find_sets
from adpa.data.cache.responses import ResponseName, ResponseSet, read_response_sets
from adpa.data.cache.signals import Scoring, SignalTable, read_scorings, read_signals
from adpa.errors import CacheError


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
    """The response sets that a run reads, by name, and the scoring that has every row that it needs."""

    sets: dict[ResponseName, ResponseSet]
    scoring: Scoring | None
    signals: SignalTable | None

    def training_sets(self, needs: Mapping[ResponseName, Need]) -> list[TrainingSet]:
        """The training sets, in the order of ``needs``."""
        return [TrainingSet(self.sets[name], self.signals if need.signals else None) for name, need in needs.items()]


@dataclass(frozen=True)
class ScoredSet:
    """A response set, and a scoring that has the signals of all its responses."""

    responses: ResponseSet
    scoring: Scoring
    signals: SignalTable

    def describe(self) -> str:
        """One line for a user who has to choose among scored sets."""
        return f"{self.responses.describe()} with scoring {self.scoring.describe()}"


def select(
    cache: Location,
    needs: Mapping[ResponseName, Need],
    student: str,
    scoring: str | None = None,
    response_sets: Sequence[str] = (),
) -> Selection:
    """Finds the one combination of response sets and scoring that has everything.

    Args:
        cache: the cache's directory.
        needs: the needs of the run, by response set.
        student: digest of the student's weights; sampled responses must be its own.
        scoring: the scoring to use, as ``find_scoring`` takes it; default: the one that fits.
        response_sets: the response sets to use, each as ``find_sets`` takes it; of a name without one, all.

    Raises:
        CacheError: no combination fits, or several do.
        DamagedFileError: a file of the cache is damaged.
    """
    check_cache(cache)
    present = _narrow(list(read_response_sets(cache)), list(needs), response_sets)
    usable = [one for one in present if one.info.sampling is None or one.info.sampling.student == student]
    groups = complete_groups(usable, list(needs))
    if not groups:
        problem, fix = _missing_sets(present, usable, list(needs), student)
        raise CacheError(f"{cache}: {problem}", fix)
    if not any(need.signals for need in needs.values()):
        return _only([Selection(group, None, None) for group in groups])
    scorings = _read_scorings(cache, scoring)
    tables = {entry.id: read_signals(cache, entry) for entry in scorings}
    pairs = [(group, entry) for group in groups for entry in scorings]
    lacks = [_lacks(group, entry, tables[entry.id], needs) for group, entry in pairs]
    fitting = [
        Selection(group, entry, tables[entry.id]) for (group, entry), lack in zip(pairs, lacks, strict=True) if not lack
    ]
    if not fitting:
        reasons = "; ".join(f"scoring {entry.id} {lack}" for (_, entry), lack in zip(pairs, lacks, strict=True))
        raise CacheError(
            f"{cache}: no scoring has the signals that are needed: {reasons}",
            "run adpa precompute with these responses, and with --reference for advantages",
        )
    return _only(fitting)


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
    tables = [(entry, read_signals(cache, entry)) for entry in _read_scorings(cache, scoring)]
    scored, left_out = [], []
    for responses in matching:
        name = responses.info.name
        lacks = [_lacks({name: responses}, entry, table, {name: Need(True, False)}) for entry, table in tables]
        scored += [ScoredSet(responses, *pair) for pair, lack in zip(tables, lacks, strict=True) if not lack]
        if all(lacks):
            reasons = "; ".join(f"scoring {entry.id} {lack}" for (entry, _), lack in zip(tables, lacks, strict=True))
            left_out.append(f"{responses.describe()}: {reasons}")
    if not scored:
        raise CacheError(
            f"{cache}: no response set has the signals of all its responses: {'; '.join(left_out)}",
            "finish scoring with the same adpa precompute",
        )
    return scored, left_out


def select_one_scored(
    cache: Location, scoring: str | None = None, response_set: str | None = None
) -> tuple[ScoredSet, list[str]]:
    """Finds the one response set with the one scoring that has all its signals; arguments as in ``select_scored``.

    Raises:
        CacheError: none fits, or more than one.
        DamagedFileError: a file of the cache is damaged.
    """
    scored, left_out = select_scored(cache, scoring, response_set)
    if len(scored) > 1:
        raise several_fit(scored)
    return scored[0], left_out


def several_fit(scored: Sequence[ScoredSet]) -> CacheError:
    """The error where exactly one combination is needed."""
    return CacheError(
        f"{len(scored)} combinations of responses and scoring fit: {'; '.join(one.describe() for one in scored)}",
        "choose with --response-set ID and --scoring ID",
    )


def _read_scorings(cache: Location, scoring: str | None) -> list[Scoring]:
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
        arguments = json.dumps(info.chat_template_kwargs, sort_keys=True)
        limits = (info.max_prompt_length, info.max_length)
        made = (arguments, info.rendered, info.turn_end)
        origin = (info.examples, info.tokenizer, info.chat_template, *made, *limits)
        by_origin[origin][info.name].append(responses)
    return [
        dict(zip(names, combination, strict=True))
        for sets in by_origin.values()
        if sets.keys() >= set(names)
        for combination in product(*(sets[name] for name in names))
    ]


def _missing_sets(
    present: Sequence[ResponseSet], usable: Sequence[ResponseSet], names: Sequence[ResponseName], student: str
) -> tuple[str, str]:
    """The reason why no group is complete, and what to do."""
    for name in names:
        if not any(one.info.name == name for one in usable):
            others = "; ".join(one.describe() for one in present if one.info.name == name)
            whose = f" of this student ({student[:8]})" if name == "sampled" else ""
            problem = f"the cache has no {name} responses{whose}" + (f"; found {others}" if others else "")
            return problem, "run adpa precompute " + ("with --student" if name == "sampled" else f"--responses {name}")
    listing = "; ".join(one.describe() for one in usable)
    return (
        f"the cache has no {' and '.join(names)} responses made from the same data with the same tokenizer and limits; "
        f"found {listing}",
        "run adpa precompute on one data set with one set of options",
    )


def _lacks(
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


def _only(fitting: Sequence[Selection]) -> Selection:
    if len(fitting) == 1:
        return fitting[0]
    listing = "; ".join(
        ", ".join(responses.describe() for responses in selection.sets.values())
        + (f" with scoring {selection.scoring.describe()}" if selection.scoring else "")
        for selection in fitting
    )
    raise CacheError(
        f"{len(fitting)} combinations of responses and scoring fit: {listing}",
        "choose with --response-set ID and --scoring ID",
    )
