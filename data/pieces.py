"""The text of each token, with every invisible character made visible."""

import unicodedata
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


def texts_in_place(
    tokenizer: "PreTrainedTokenizerBase", token_ids: NDArray[Any], alternatives: NDArray[Any]
) -> list[list[str]]:
    """The text of each token of a sequence, then of each alternative in its place.

    The text of a token may depend on the token before it (a leading space), and the bytes of one character may be
    spread over several tokens. So the text of a token is the text that it adds to the tokens before it. The token that
    completes a character has the whole character; the tokens before it have ``INCOMPLETE``. A token that adds nothing
    has its id, as ⟨id⟩.

    Args:
        tokenizer: the tokenizer.
        token_ids: integers [T].
        alternatives: integers [T, C].

    Returns:
        T lists of 1 + C texts.
    """
    ids = token_ids.tolist()
    texts = []
    context = shown = 0  # ids[context:shown] is context enough to decode; later ids lack bytes of a character
    for place, others in enumerate(alternatives.tolist()):
        candidates = [ids[place], *others]
        before, *whole = tokenizer.batch_decode(
            [ids[context:shown], *([*ids[context:place], candidate] for candidate in candidates)],
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )
        texts.append(
            [
                INCOMPLETE if text.endswith(INCOMPLETE) else text[len(before) :].lstrip(INCOMPLETE) or f"⟨{candidate}⟩"
                for candidate, text in zip(candidates, whole, strict=True)
            ]
        )
        if texts[-1][0] != INCOMPLETE:
            context, shown = shown, place + 1
    return texts


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
