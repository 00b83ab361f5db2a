"""The columns of preference data: which are read, and what others may be meant to be."""

import re
from collections.abc import Iterable
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
    "system_prompt": "name it system",
    "system_message": "name it system",
    "functions": "name it tools",
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
    ),
    "rejected": (
        *("refused", "dispreferred", "reject", "negative", "worse", "loser", "lose", "bad", "neg"),
        *("rejected_response", "response_rejected", "dispreferred_response", "rejected_answer"),
        *("answer_rejected", "rejected_output", "response_l", "response_k"),
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
def missing_columns(names: tuple[str, ...]) -> tuple[str, str] | None:
    """What is wrong with columns that lack a response, and what to do; none if both are there."""
    missing = [column for column in RESPONSE_COLUMNS if column not in names]
    if not missing or has_output_for_chosen(names):
        return None
    wanted = " and ".join(f"`{column}`" for column in missing)
    found = f"the columns {printable(names)}" if names else "no columns"
    fix = "name the columns prompt, chosen and rejected"
    if any(column in missing for column in _renamed(names)):
        fix += f" ({renaming(names)})"
    elif len(missing) == 2:
        fix = "a row needs a prompt and two responses to it: prompt, chosen and rejected"
        if {"prompt", "instruction", *CONVERSATION_COLUMNS} & {*names}:
            fix += "; prompts alone are enough where only --student answers them"
    return f"found {found}; expected {wanted}", fix


def has_output_for_chosen(names: tuple[str, ...]) -> bool:
    """Whether columns are Alpaca's, with ``rejected`` beside ``output``, which then is the chosen response."""
    return {"instruction", "output", "rejected"}.issubset(names) and "chosen" not in names


@lru_cache(maxsize=64)
def lacks_responses(names: tuple[str, ...]) -> bool:
    """Whether columns have no response, and none that is obviously meant to be one, under another name."""
    renamed = _renamed(names)
    return not any(column in names or column in renamed for column in RESPONSE_COLUMNS)


@lru_cache(maxsize=64)
def renaming(names: tuple[str, ...]) -> str:
    """What columns are to be renamed so that a pair's own columns are there; empty if nothing is obvious."""
    renamed = _renamed(names)
    return (
        "rename " + ", ".join(f"{printable([name])} to {column}" for column, name in renamed.items()) if renamed else ""
    )


def _renamed(names: tuple[str, ...]) -> dict[str, str]:
    """The columns that a pair lacks, and the columns that are obviously meant."""
    plain = {re.sub(r"\W+", "_", name.strip().lower()): name for name in names if name not in READ_COLUMNS}
    meant = plain | {name: name for name in names if name in PROMPT_COLUMNS}
    renamed = {}
    for column, others in OTHER_NAMES.items():
        if column not in names:
            near = get_close_matches(column, plain, n=1, cutoff=0.8)
            known = [meant[name] for name in (column, *near, *others) if name in meant]
            if known:
                renamed[column] = known[0]
    return renamed
