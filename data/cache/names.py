"""Finds the response sets and the scoring that a user names.

Users copy what a command printed (a name with its id, a file, a folder, a whole line), or type the beginning of an id,
in any case.
"""

import re
from collections.abc import Sequence

from adpa.data.cache.responses import RESPONSE_NAMES, ResponseSet
from adpa.data.cache.signals import Scoring
from adpa.errors import CacheError, ListedError, empty_value

# A text may have more around a whole name: folders, a file's checksum, the rest of a line. The last name counts.
WHOLE_SET = re.compile(rf"({'|'.join(RESPONSE_NAMES)})[- ]+([0-9a-f]{{16}})(?![0-9a-f])")
WHOLE_SCORING = re.compile(r"(?:^|scorings?[ /]+|by )([0-9a-f]{16})(?![0-9a-f])")


def find_sets(text: str, present: Sequence[ResponseSet], option: str = "--response-set") -> list[ResponseSet]:
    """The response sets that a text names: all sets of a name such as ``chosen``, or one set.

    One set is named by its id or name and id, by the beginning of either, or by any text with its name and id, such as
    its file.

    Raises:
        OptionError: the text is empty.
        CacheError: no set fits, or a beginning fits several.
    """
    text = _tidy(option, text)
    whole = WHOLE_SET.findall(text.lower())
    beginning = "-".join(whole[-1]) if whole else text.lower().removeprefix("responses/")
    if beginning in RESPONSE_NAMES:
        fitting = [one for one in present if one.info.name == beginning]
    else:
        fitting = [one for one in present if _begins(beginning, one.id, one.shard_prefix())]
        if len(fitting) > 1:
            raise _several(option, text, "response sets", list(map(_set_line, fitting)))
    if not fitting:
        raise _none(option, text, present, list(map(_set_line, present)), "response sets")
    return fitting


def find_scoring(text: str, present: Sequence[Scoring]) -> Scoring:
    """The scoring that a text names: by its id, the beginning of its id, or any text with the id, such as its folder.

    Raises:
        OptionError: the text is empty.
        CacheError: no scoring fits, or several do.
    """
    text = _tidy("--scoring", text)
    whole = WHOLE_SCORING.findall(text.lower())
    beginning = whole[-1] if whole else re.sub("^scorings?[ /]", "", text.lower())
    fitting = [one for one in present if _begins(beginning, one.id)]
    if len(fitting) > 1:
        raise _several("--scoring", text, "scorings", list(map(_scoring_line, fitting)))
    if not fitting:
        raise _none("--scoring", text, present, list(map(_scoring_line, present)), "scorings")
    return fitting[0]


def _tidy(option: str, text: str) -> str:
    tidy = " ".join(text.split()).strip(",;:'\"`")
    if not tidy:
        raise empty_value(option, tidy)
    return tidy


def _begins(beginning: str, *names: str) -> bool:
    return beginning != "" and any(name.startswith(beginning) for name in names)


def _set_line(responses: ResponseSet) -> str:
    """A set in a list, with the option that names it at the end, so that the whole line names it too."""
    data = f", from {responses.record.describe()}" if responses.record else ""
    return f"{responses.describe_content()}{data}: --response-set {responses.shard_prefix()}"


def _scoring_line(scoring: Scoring) -> str:
    return f"{scoring.settings}: --scoring {scoring.id}"


def _none(
    option: str, text: str, present: Sequence[ResponseSet | Scoring], lines: Sequence[str], kind: str
) -> CacheError:
    problem = f"{option} {text}: the cache has none"
    if len(lines) > 1:
        return ListedError(problem, "name one of these", *lines)
    return CacheError(f"{problem}; found {present[0].describe() if present else f'no {kind}'}")


def _several(option: str, text: str, kind: str, lines: Sequence[str]) -> CacheError:
    return ListedError(f"{option} {text}: {len(lines)} {kind} fit", "name one of them", *lines)
