"""Finds the response sets and the scoring that a user names.

Users copy what a command printed (a name with its id, a file, a folder, a whole line), or type the beginning of an id.
"""

import re
from collections.abc import Sequence

from adpa.data.cache.responses import RESPONSE_NAMES, ResponseSet
from adpa.data.cache.signals import Scoring
from adpa.errors import CacheError

# A text may have more around a whole name: folders, a file's checksum, the rest of a line. The last name counts.
WHOLE_SET = re.compile(rf"({'|'.join(RESPONSE_NAMES)})[- ]+([0-9a-f]{{16}})(?![0-9a-f])")
WHOLE_SCORING = re.compile(r"(?:^|scorings?[ /]+|by )([0-9a-f]{16})(?![0-9a-f])")


def find_sets(text: str, present: Sequence[ResponseSet]) -> list[ResponseSet]:
    """The response sets that a text names: all sets of a name such as ``chosen``, or one set.

    One set is named by its id or name and id, by the beginning of either, or by any text with its name and id, such as
    its file.

    Raises:
        CacheError: no set fits, or a beginning fits several.
    """
    text = _tidy(text)
    whole = WHOLE_SET.findall(text)
    beginning = "-".join(whole[-1]) if whole else text.removeprefix("responses/")
    if beginning in RESPONSE_NAMES:
        fitting = [one for one in present if one.info.name == beginning]
    else:
        fitting = [one for one in present if _begins(beginning, one.id, one.shard_prefix())]
        if len(fitting) > 1:
            raise _several("--response-set", text, "response sets", [one.describe() for one in fitting])
    if not fitting:
        raise _none("--response-set", text, [one.describe() for one in present] or ["no response sets"])
    return fitting


def find_scoring(text: str, present: Sequence[Scoring]) -> Scoring:
    """The scoring that a text names: by its id, the beginning of its id, or any text with the id, such as its folder.

    Raises:
        CacheError: no scoring fits, or several do.
    """
    text = _tidy(text)
    whole = WHOLE_SCORING.findall(text)
    beginning = whole[-1] if whole else re.sub("^scorings?[ /]", "", text)
    fitting = [one for one in present if _begins(beginning, one.id)]
    if len(fitting) > 1:
        raise _several("--scoring", text, "scorings", [one.describe() for one in fitting])
    if not fitting:
        raise _none("--scoring", text, [one.describe() for one in present] or ["no scorings"])
    return fitting[0]


def _tidy(text: str) -> str:
    return " ".join(text.split()).strip(",;:'\"`")


def _begins(beginning: str, *names: str) -> bool:
    return beginning != "" and any(name.startswith(beginning) for name in names)


def _none(option: str, text: str, present: Sequence[str]) -> CacheError:
    problem = f"{option} {text}: the cache has none" if text else f"{option} '': an empty name"
    return CacheError(f"{problem}; found {'; '.join(present)}")


def _several(option: str, text: str, kind: str, fitting: Sequence[str]) -> CacheError:
    return CacheError(f"{option} {text}: {len(fitting)} {kind} fit: {'; '.join(fitting)}", "name one of them")
