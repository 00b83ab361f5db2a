"""The texts of tokens: they add up to the whole, split characters are whole, and none controls a terminal."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from adpa.data.pieces import INCOMPLETE, texts_in_place, visible

NONE = np.empty((1, 0), dtype=np.int32)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> NDArray[Any]:
    return np.array(tokenizer(text, add_special_tokens=False)["input_ids"])


def own_texts(tokenizer: PreTrainedTokenizerBase, ids: NDArray[Any]) -> list[str]:
    return [own for (own,) in texts_in_place(tokenizer, ids, NONE.repeat(len(ids), axis=0))]


def test_the_texts_of_a_response_add_up_to_it(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "Two  spaces,\n\ta tab; <b>tags</b><|im_end|>\n"
    assert "".join(own_texts(tokenizer, encode(tokenizer, text))) == text


def test_the_last_token_of_a_split_character_has_all_of_it(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "So 天気 🦊!"
    ids = encode(tokenizer, text)
    texts = own_texts(tokenizer, ids)
    assert INCOMPLETE in texts, "the tokenizer splits the bytes of a rare character"
    assert len(texts) == len(ids)
    assert "".join(piece for piece in texts if piece != INCOMPLETE) == text


def test_bytes_that_never_become_a_character_are_shown_once(tokenizer: PreTrainedTokenizerBase) -> None:
    first_byte = encode(tokenizer, "🦊")[0]
    ids = np.concatenate([[first_byte, first_byte], encode(tokenizer, " yes"), [first_byte]])
    assert own_texts(tokenizer, ids) == [INCOMPLETE, INCOMPLETE, " yes", INCOMPLETE]


def test_an_alternative_is_written_as_it_would_be_in_its_place(tokenizer: PreTrainedTokenizerBase) -> None:
    *head, last = encode(tokenizer, "🦊")
    other = encode(tokenizer, " no")[0]
    alternatives = np.full((len(head) + 1, 2), [last, other])
    assert texts_in_place(tokenizer, np.array([*head, last]), alternatives)[-1] == ["🦊", "🦊", " no"]


def test_a_token_without_text_has_its_id(tokenizer: PreTrainedTokenizerBase) -> None:
    beyond = 60_000  # a padded embedding matrix has such rows
    (texts,) = texts_in_place(tokenizer, encode(tokenizer, "a"), np.array([[beyond]]))
    assert texts == ["a", "⟨60000⟩"]


def test_a_sentencepiece_tokenizer_keeps_the_spaces_between_words() -> None:
    vocabulary = {"<unk>": 0, "▁the": 1, "▁cat": 2, "s": 3, "<0xF0>": 4, "<0x9F>": 5, "<0xA6>": 6, "<0x8A>": 7}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert own_texts(tokenizer, np.array([1, 2, 3, 4, 5, 6, 7, 2])) == [
        "the", " cat", "s", INCOMPLETE, INCOMPLETE, INCOMPLETE, "🦊", " cat",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\n\tb", "a↵⇥b"),
        ("\x1b[31mred\x07", "␛[31mred␇"),
        ("\x9b2J", "\\u{9b}2J"),
        ("\u202eevil", "\\u{202e}evil"),
        ("\u2028", "\\u{2028}"),
        ("日本 é 🦊 <b>", "日本 é 🦊 <b>"),
    ],
)
def test_nothing_invisible_is_left(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_a_newline_may_also_break_the_line() -> None:
    assert visible("a\nb", newline="↵\n") == "a↵\nb"
