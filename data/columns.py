"""The columns of preference data: which are read, and what others may be meant to be."""

import re
from collections.abc import Collection, Iterable
from difflib import get_close_matches

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


def missing_columns(names: Collection[str]) -> tuple[str, str] | None:
    """What is wrong with columns that lack a response, and what to do; none if both are there."""
    missing = [column for column in RESPONSE_COLUMNS if column not in names]
    if not missing:
        return None
    wanted = " and ".join(f"`{column}`" for column in missing)
    renamed = renaming(names)
    fix = "name the columns prompt, chosen and rejected"
    if renamed:
        fix += f" ({renamed})"
    elif len(missing) == 2:
        fix = f"a pair has two responses to one prompt; {fix}"
    return f"found the columns {printable(names)}; expected {wanted}", fix


def renaming(names: Collection[str]) -> str:
    """What columns are to be renamed so that a pair's own columns are there; empty if nothing is obvious."""
    free = {re.sub(r"\W+", "_", name.strip().lower()): name for name in names if name not in READ_COLUMNS}
    free |= {name: name for name in names if name in PROMPT_COLUMNS}
    found = []
    for column, others in OTHER_NAMES.items():
        if column not in names:
            near = get_close_matches(column, [name for name in free if name not in PROMPT_COLUMNS], n=1, cutoff=0.8)
            known = [name for name in (column, *others, *near) if name in free]
            found += [f"rename {printable([free[name]])} to {column}" for name in known[:1]]
    return ", ".join(found)
