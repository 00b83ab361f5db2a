"""The columns of preference data: which are read, and what others may be meant to be."""

import re
import shlex
from collections.abc import Collection, Iterable
from difflib import get_close_matches
from functools import lru_cache

RESPONSE_COLUMNS = ("chosen", "rejected")
TEMPLATE_COLUMNS = ("system", "tools", "chat_template_kwargs")
MEDIA_COLUMNS = {
    *("image", "images", "image_url", "image_urls", "image_path", "image_paths", "pixel_values"),
    *("video", "videos", "audio", "audios"),
}
# Columns that other programs make a part of the prompt, and what to do with them.
PROMPT_COLUMNS = {
    "system_prompt": "pass --map system=system_prompt",
    "system_message": "pass --map system=system_message",
    "functions": "pass --map tools=functions",
    "documents": "put it into chat_template_kwargs",
    "history": "write it into `prompt` as messages",
} | dict.fromkeys(("context", "instruction", "input", "query"), "write it into `prompt`")
# The columns of other programs' forms, which adpa.data.forms reads.
CONVERSATION_COLUMNS = ("conversations", "conversation", "messages")
ALPACA_PROMPT = ("instruction", "input", "history")
FORM_COLUMNS = (*CONVERSATION_COLUMNS, "output")
READ_COLUMNS = {"prompt", *RESPONSE_COLUMNS, *TEMPLATE_COLUMNS, *MEDIA_COLUMNS, *PROMPT_COLUMNS}

# How other programs name them.
OTHER_NAMES = {
    "prompt": ("question", "instruction", "query", "problem", "user", "input"),
    "chosen": (
        *("accepted", "preferred", "accept", "positive", "better", "winner", "win", "good", "pos"),
        *("chosen_response", "response_chosen", "accepted_response", "preferred_response", "chosen_answer"),
        *("answer_chosen", "accepted_answer", "preferred_answer", "chosen_output", "response_w", "response_j"),
        "chosen_conversations",
    ),
    "rejected": (
        *("refused", "dispreferred", "reject", "negative", "worse", "loser", "lose", "bad", "neg"),
        *("rejected_response", "response_rejected", "dispreferred_response", "rejected_answer"),
        *("answer_rejected", "rejected_output", "response_l", "response_k"),
        "rejected_conversations",
    ),
}
MOST_NAMES, MOST_CHARACTERS = 12, 40  # of columns in a message; of a column's name


def printable(names: Iterable[str]) -> str:
    """The names of columns for one line of text; of many, the first ones."""
    names = list(names)
    shown = [name if name.isprintable() and name == name.strip() != "" else repr(name) for name in names[:MOST_NAMES]]
    more = [f"and {len(names) - MOST_NAMES} more"] if len(names) > MOST_NAMES else []
    cut = [name if len(name) <= MOST_CHARACTERS else f"{name[:MOST_CHARACTERS]}…" for name in shown]
    return ", ".join(cut + more) or "none"


@lru_cache(maxsize=64)  # all rows of a file may lack the same ones
def missing_columns(names: tuple[str, ...], given: str | None = None) -> tuple[str, str] | None:
    """What is wrong with columns that lack a response, and what to do; none if both are there.

    Args:
        names: the columns, as the map has them.
        given: the map, as ``--map`` takes it.
    """
    missing = [column for column in RESPONSE_COLUMNS if column not in names]
    if not missing or has_output_for_chosen(names):
        return None
    wanted = " and ".join(f"`{column}`" for column in missing)
    found = f"the columns {printable(names)}" if names else "no columns"
    if spaced := [name for name in names if name not in missing and name.strip() in missing]:
        fix = f"rename {printable(spaced)}: take the spaces away"
    elif _meant(names).keys() & {*missing}:
        fix = f"pass {_map_option(names, missing, given)}"
    elif len(missing) == 2:
        lacking = missing if {"prompt", *CONVERSATION_COLUMNS} & {*names} else ["prompt", *missing]
        fix = f"a row needs a prompt and two responses: name them with {_map_option(names, lacking, given)}"
        if {"prompt", "instruction", *CONVERSATION_COLUMNS} & {*names}:
            fix += "; prompts alone are enough where only --student answers them"
    else:
        fix = f"name it with {_map_option(names, missing, given)}"
    return f"found {found}; expected {wanted}", fix


def missing_prompt(names: tuple[str, ...]) -> tuple[str, str] | None:
    """What is wrong with columns of prompts alone that lack the prompt, and what to do; none if it is there."""
    if {"prompt", "instruction", *CONVERSATION_COLUMNS} & {*names}:
        return None
    fix = suggest_map(names) or f"name it with {_map_option(names, ('prompt',))}"
    return f"found the columns {printable(names)}; expected `prompt`", fix


def has_output_for_chosen(names: tuple[str, ...]) -> bool:
    """Whether columns are Alpaca's, with ``rejected`` beside ``output``, which then is the chosen response."""
    return {"instruction", "output", "rejected"}.issubset(names) and "chosen" not in names


@lru_cache(maxsize=64)
def lacks_responses(names: tuple[str, ...]) -> bool:
    """Whether columns have no response, and none that is obviously meant to be one, under another name."""
    found = {*_meant(names), *(name.strip() for name in names)}
    return not any(column in found for column in RESPONSE_COLUMNS)


@lru_cache(maxsize=64)
def suggest_map(names: tuple[str, ...]) -> str:
    """What to do so that a pair has its columns: the ``--map`` to copy; empty if nothing is obvious."""
    return f"pass {_map_option(names, ())}" if _meant(names) else ""


def _map_option(names: tuple[str, ...], needed: Collection[str], given: str | None = None) -> str:
    """The ``--map`` to copy, with the given one. NAME stands for what is needed and not obvious."""
    meant = _meant(names)
    entries = [f"{column}={meant.get(column, 'NAME')}" for column in OTHER_NAMES if column in {*meant, *needed}]
    return f"--map {shlex.quote(','.join([*([given] if given else []), *entries]))}"


def _meant(names: tuple[str, ...]) -> dict[str, str]:
    """The columns that a pair lacks, and the columns that are obviously meant; ``--map`` can have their names."""
    usable = [name for name in names if name.isprintable() and name == name.strip() and not {",", "="} & {*name}]
    plain = {re.sub(r"\W+", "_", name.lower()): name for name in usable if name not in READ_COLUMNS}
    known = plain | {name: name for name in usable if name in PROMPT_COLUMNS}
    meant = {}
    for column, others in OTHER_NAMES.items():
        if column not in names:
            near = get_close_matches(column, plain, n=1, cutoff=0.8)
            found = [known[name] for name in (column, *near, *others) if name in known]
            if found:
                meant[column] = found[0]
    return meant
