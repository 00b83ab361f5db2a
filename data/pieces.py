"""Tokens as people read them: the text that each adds, with nothing invisible in it."""

import unicodedata
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


def texts_in_place(
    tokenizer: "PreTrainedTokenizerBase", token_ids: NDArray[Any], alternatives: NDArray[Any]
) -> list[list[str]]:
    """The text of each token of a sequence, then of each alternative if it stood in that place.

    A tokenizer may write a token differently after another (a leading space), and may spread the bytes of one
    character over several tokens. So a text is what the token adds to the text before it: the token that completes a
    character has all of it, those before have ``INCOMPLETE``. A token that adds nothing has its id, as ⟨id⟩.

    Args:
        tokenizer: the tokenizer.
        token_ids: integers [T].
        alternatives: integers [T, C].

    Returns:
        T lists of 1 + C texts.
    """
    ids = token_ids.tolist()
    texts = []
    context = shown = 0  # ids[context:shown] is enough to decode by; what lies after it waits for its last bytes
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
    """Text in which every character can be seen and none can steer a terminal or the direction of the writing."""
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
