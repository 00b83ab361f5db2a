"""Finds the response sets of a second data set, on which a run is evaluated while it trains."""

import os
import re
import shlex
from collections.abc import Mapping, Sequence

from adpa.data.cache.choice import Combination, choose
from adpa.data.cache.locations import Location
from adpa.data.cache.names import WHOLE_SET, find_sets
from adpa.data.cache.responses import RESPONSE_NAMES, ResponseName, ResponseSet, read_response_sets
from adpa.data.cache.selection import Need, Selection, complete_groups, missing_signals
from adpa.data.cache.signals import ModelIdentity
from adpa.errors import CacheError, OptionError

OPTION = "--validation"
SOME_ID = re.compile(rf"(?:(?:{'|'.join(RESPONSE_NAMES)})-)?[0-9a-f]+", re.IGNORECASE)
A_SHARE = "give a share of the data such as 0.02"


def find_named(text: str, present: Sequence[ResponseSet]) -> list[ResponseSet]:
    """The response sets that a text names: all sets that were made from some data, or sets by their ids.

    Args:
        text: data, as ``precompute --data`` or the record of a set has it, or ids of sets with commas between them.
        present: the sets of the cache.

    Raises:
        CacheError: no set fits.
    """
    if of_data := [one for one in present if _is_from(one, text)]:
        return of_data
    pieces = [piece.strip() for piece in text.split(",") if piece.strip()]
    if pieces and all(WHOLE_SET.search(piece.lower()) or SOME_ID.fullmatch(piece) for piece in pieces):
        return [one for piece in pieces for one in find_sets(piece, present, OPTION)]
    known = list(dict.fromkeys(one.record.source for one in present if one.record))
    found = f"; found {', '.join(known)}" if known else ""
    raise CacheError(
        f"{OPTION} {text}: the cache has no responses from this data{found}",
        f"run adpa precompute with --data {shlex.quote(text)}, or {A_SHARE}",
    )


def _is_from(responses: ResponseSet, text: str) -> bool:
    """Whether a set was made from the data that a text names, with the split or without it."""
    if responses.record is None:
        return False
    path = os.path.abspath(os.path.expanduser(text))
    return not {text, path, os.path.realpath(path)}.isdisjoint({responses.record.data, responses.record.source})


def held_out_ids(text: str, present: Sequence[ResponseSet], trained_on: Sequence[str]) -> list[str]:
    """The ids of the sets that are not trained on because ``--validation`` names them.

    Args:
        text: see ``find_named``.
        present: the sets of the cache.
        trained_on: the sets that ``--response-set`` names, which are trained on.

    Raises:
        CacheError: no set fits.
        OptionError: no set is left to train on.
    """
    named = {one.id for one in find_named(text, present)}
    named -= {one.id for name in trained_on if name not in RESPONSE_NAMES for one in find_sets(name, present)}
    if all(one.id in named for one in present):
        raise OptionError(
            f"{OPTION} {text}: all responses of the cache are from this data, and none are left to train on",
            f"name other data, or {A_SHARE}",
        )
    return sorted(named)


def select_held_out(
    cache: Location,
    text: str,
    needs: Mapping[ResponseName, Need],
    student: ModelIdentity,
    training: Selection,
    earlier: Mapping[ResponseName, str] = {},  # only read
) -> Selection:
    """Finds the response sets that ``--validation`` names, with the signals of the training data's scoring.

    Args:
        cache: the cache's directory.
        text: see ``find_named``.
        needs: the needs of the run, by response set.
        student: the student; sampled responses must be its own.
        training: the response sets and the scoring that are trained on.
        earlier: the ids of the response sets of the run that this one resumes: they go before newer ones.

    Raises:
        CacheError: no sets of it fit the training data, they lack signals, or several combinations fit.
        OptionError: they are trained on.
    """
    present = list(read_response_sets(cache))
    of_text = find_named(text, present)
    named = [one for one in of_text if one.id not in training.ids["responses"].values()]
    missing = [
        name for name in needs if not any(one.info.name == name and _is_of(one, student.digest) for one in named)
    ]
    command = _precompute(cache, text, named, training) + (f" --student {student.name}" if "sampled" in missing else "")
    if missing:
        trained_on = [name for name in missing if any(one.info.name == name for one in of_text if one not in named)]
        if trained_on:
            raise OptionError(
                f"{OPTION} {text}: the run trains on its {' and '.join(trained_on)} responses",
                f"name other data, or {A_SHARE}",
            )
        whose = " of this student" if "sampled" in missing else ""
        raise CacheError(
            f"{OPTION} {text}: the cache has no {' and no '.join(missing)} responses of it{whose}", command
        )
    groups = complete_groups(
        [one for one in named if one.info.name in needs and _is_of(one, student.digest)], list(needs)
    )
    encoding = next(iter(training.sets.values())).info.encoding
    fitting = [group for group in groups if next(iter(group.values())).info.encoding == encoding]
    if not fitting:
        raise CacheError(
            f"{OPTION} {text}: its responses were made with another tokenizer, chat template or length than those that "
            "are trained on",
            f"{command}, and with the same options",
        )
    lacks = [
        training.scoring
        and training.signals is not None
        and missing_signals(group, training.scoring, training.signals, needs)
        for group in fitting
    ]
    if all(lacks):
        raise CacheError(f"{OPTION} {text}: scoring {training.ids['scoring']} {lacks[0]}", command)
    whole = [
        Selection(group, training.scoring, training.signals)
        for group, lack in zip(fitting, lacks, strict=True)
        if not lack
    ]
    again = [one for one in whole if one.ids["responses"] == earlier]
    return (again or [choose(whole, _validation_of)])[0]


def _is_of(responses: ResponseSet, student: str) -> bool:
    return responses.info.sampling is None or responses.info.sampling.student == student


def _validation_of(combination: Combination) -> str:
    return f"{OPTION} {','.join(one.shard_prefix() for one in combination.sets.values())}"


def _precompute(cache: Location, text: str, named: Sequence[ResponseSet], training: Selection) -> str:
    """What makes responses and signals of the data that the training data has already."""
    record = next((one.record for one in named if one.record), None)
    data = [text] if record is None else [record.data, *(["--split", record.split] if record.split else [])]
    words = ["--data", *data, "--cache", str(cache)]
    if scoring := training.scoring:
        words += ["--teacher", scoring.teacher.name, "--top-k", str(scoring.top_k)]
        words += ["--reference", scoring.reference.name] if scoring.reference else []
    return f"run adpa precompute {shlex.join(words)}"
