"""The text of each token in whole characters, with every invisible character made visible."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
BYTE = re.compile("<0x([0-9A-F]{2})>")  # a token of SentencePiece's byte fallback


@dataclass(frozen=True)
class Piece:
    """The text of a token in its place.

    The bytes of a character may lie in several tokens. Then the first of them has the whole character.

    Attributes:
        text: the text that the token adds; empty for the second of several tokens that make a character.
        part: which of these tokens it is, from 1.
        label: what to call the token where it stands alone: its text, or ``🦊(2/3)`` for the second of three tokens, or
            ``⟨id⟩`` if it adds nothing.
        alternatives: the same for other tokens in its place; one that makes no whole character has its bytes, as
            ``⟨F0 9F⟩``.
    """

    text: str
    part: int
    label: str
    alternatives: list[str]


def texts_in_place(
    tokenizer: "PreTrainedTokenizerBase", token_ids: NDArray[Any], alternatives: NDArray[Any]
) -> list[Piece]:
    """The text of each token of a sequence, then of each alternative in its place.

    The text of a token may depend on the token before it (a leading space). So the text of a token is the text that it
    adds to the tokens before it. Together the texts are the decoded sequence.

    Args:
        tokenizer: the tokenizer.
        token_ids: integers [T].
        alternatives: integers [T, C].

    Returns:
        T pieces, with C alternatives each.
    """
    ids = token_ids.tolist()
    own: list[tuple[str, int, str]] = []
    others: list[list[str]] = []
    context = first = 0  # ids[context:first] is context enough to decode; the tokens from first on end in a character
    whole: list[str] = []  # the texts from context to each of these tokens
    for place, candidates in enumerate(alternatives.tolist()):
        before, text, *rest = tokenizer.batch_decode(
            [ids[context:first], *([*ids[context:place], candidate] for candidate in (ids[place], *candidates))],
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )
        others.append([_added(tokenizer, *pair, before) for pair in zip(candidates, rest, strict=True)])
        whole.append(text)
        if not text.endswith(INCOMPLETE) or place == len(ids) - 1:
            own += _parts(ids[first : place + 1], whole, before)
            context, first, whole = first, place + 1, []
    pieces = []
    for token, (text, part, label), candidates, labels in zip(ids, own, alternatives.tolist(), others, strict=True):
        labels = [label if candidate == token else one for candidate, one in zip(candidates, labels, strict=True)]
        pieces.append(Piece(text, part, label, labels))
    return pieces


def _parts(ids: Sequence[int], whole: Sequence[str], before: str) -> list[tuple[str, int, str]]:
    """Text, part and label of tokens of which all but the last may end within a character.

    Args:
        ids: the tokens.
        whole: the text up to each of them.
        before: the text up to the first of them.
    """
    final = [all(later.startswith(text) for later in whole[place:]) for place, text in enumerate(whole)]
    groups: list[tuple[str, int]] = []  # texts, and the number of tokens that make each
    count, end = 0, before
    for text, is_final in zip(whole, final, strict=True):
        count += 1
        if is_final and text == end and groups:
            groups[-1] = groups[-1][0], groups[-1][1] + count
            count = 0
        elif is_final:
            groups.append((text[len(end) :], count))
            count, end = 0, text
    parts = []
    for text, tokens in groups:
        parts.append((text, 1, text if tokens == 1 else f"{text}(1/{tokens})"))
        parts += [("", part, f"{text}({part}/{tokens})") for part in range(2, tokens + 1)]
    return [(text, part, label or f"⟨{token}⟩") for token, (text, part, label) in zip(ids, parts, strict=True)]


def _added(tokenizer: "PreTrainedTokenizerBase", token: int, whole: str, before: str) -> str:
    """What an alternative adds to the text before it; its bytes, or else its id, if that is no whole character."""
    text = "" if whole.endswith(INCOMPLETE) else whole[len(before) :].lstrip(INCOMPLETE)
    if text:
        return text
    name = tokenizer.convert_ids_to_tokens(token)
    if not isinstance(name, str) or whole == before:
        return f"⟨{token}⟩"
    codes = BYTE.findall(name) or [_byte_codes().get(character, "") for character in name]
    return f"⟨{' '.join(codes)}⟩" if all(codes) else f"⟨{token}⟩"


@cache
def _byte_codes() -> dict[str, str]:
    """The bytes, as hexadecimal digits, by the characters that stand for them in the tokens of byte-level BPE."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode  # imports torch

    return {character: f"{byte:02X}" for byte, character in bytes_to_unicode().items()}


def visible(text: str, newline: str = "↵") -> str:
    """The text with every character visible: none can control a terminal or the writing direction."""
    return "".join(_visible_character(character, newline) for character in text)


def _visible_character(character: str, newline: str) -> str:
    if character == "\n":
        return newline
    if character == "\t":
        return "⇥"
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)  # the picture of the control character
    if unicodedata.category(character) in ("Cc", "Cf", "Co", "Cs", "Zl", "Zp"):
        return f"\\u{{{code:x}}}"
    return character
