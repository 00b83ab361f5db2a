"""The texts of tokens: they add up to the whole, every character is whole, and none controls a terminal."""

import random
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from adpa.data.pieces import INCOMPLETE, Piece, texts_in_place, visible

ALPHABETS = [
    "abc de,.\n\t",
    "天気日本語한국",
    "🦊🙂👩🏽\u200d🚀🇩🇪",
    "éàüñß",
    "اردو",
    "हिन्दी",
    INCOMPLETE,
    "\0\x1b\u202e",
]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> NDArray[Any]:
    return np.array(tokenizer(text, add_special_tokens=False)["input_ids"])


def pieces(tokenizer: PreTrainedTokenizerBase, ids: NDArray[Any]) -> list[Piece]:
    return texts_in_place(tokenizer, ids, np.empty((len(ids), 0), dtype=np.int32))


def own_texts(tokenizer: PreTrainedTokenizerBase, ids: NDArray[Any]) -> list[str]:
    return [piece.text for piece in pieces(tokenizer, ids)]


def with_byte_fallback() -> PreTrainedTokenizerBase:
    """A tokenizer as SentencePiece makes them: a few words, and all bytes for what it does not know."""
    words = ["<unk>", "▁", "▁the", "▁cat", "s", "a", "e", "t"]
    vocabulary = {word: number for number, word in enumerate([*words, *(f"<0x{byte:02X}>" for byte in range(256))])}
    merges = [("t", "e")]
    vocabulary["te"] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def test_the_texts_of_a_response_add_up_to_it(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "Two  spaces,\n\ta tab; <b>tags</b><|im_end|>\n"
    assert "".join(own_texts(tokenizer, encode(tokenizer, text))) == text


@pytest.mark.parametrize("kind", ["bytes", "byte fallback"])
def test_any_text_adds_up_and_no_character_is_broken(kind: str, tokenizer: PreTrainedTokenizerBase) -> None:
    shown = tokenizer if kind == "bytes" else with_byte_fallback()
    chance = random.Random(0)
    for _ in range(60):
        text = "".join(chance.choice(chance.choice(ALPHABETS)) for _ in range(chance.randrange(1, 30)))
        ids = encode(shown, text)
        found = pieces(shown, ids)
        assert "".join(piece.text for piece in found) == shown.decode(ids, clean_up_tokenization_spaces=False) == text
        assert sum(piece.text.count(INCOMPLETE) for piece in found) == text.count(INCOMPLETE)
        assert [piece for piece in found if piece.part > 1 and piece.text] == []


def test_the_first_token_of_a_split_character_has_all_of_it(tokenizer: PreTrainedTokenizerBase) -> None:
    found = pieces(tokenizer, encode(tokenizer, "So 天気 🦊!"))
    assert [piece.text for piece in found] == ["So", " 天", "", "", "気", "", "", " 🦊", "", "", "!"]
    assert [piece.part for piece in found] == [1, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1]
    assert [piece.label for piece in found][6:] == ["気(3/3)", " 🦊(1/3)", " 🦊(2/3)", " 🦊(3/3)", "!"]


def test_a_response_that_ends_within_a_character_says_so_once(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = encode(tokenizer, "So 天")[:-1]
    assert own_texts(tokenizer, ids) == ["So", f" {INCOMPLETE}", ""]


def test_bytes_that_never_become_a_character_are_shown_once(tokenizer: PreTrainedTokenizerBase) -> None:
    first_byte = encode(tokenizer, "🦊")[0]
    ids = np.concatenate([[first_byte, first_byte], encode(tokenizer, " yes"), [first_byte]])
    assert own_texts(tokenizer, ids) == [INCOMPLETE, INCOMPLETE, " yes", INCOMPLETE]


def test_a_token_that_ends_bad_bytes_and_begins_others_keeps_them_apart(tokenizer: PreTrainedTokenizerBase) -> None:
    first, second, *_ = encode(tokenizer, "🦊")
    ids = np.array([first, second, first, second, *encode(tokenizer, "!")])
    found = pieces(tokenizer, ids)
    assert [piece.text for piece in found] == [INCOMPLETE, "", INCOMPLETE, "", "!"]
    assert [piece.part for piece in found] == [1, 2, 1, 2, 1]


def test_an_alternative_is_written_as_it_would_be_in_its_place(tokenizer: PreTrainedTokenizerBase) -> None:
    first, *_, last = ids = encode(tokenizer, "🦊")
    other, owl = encode(tokenizer, " no")[0], encode(tokenizer, "🦉")[-1]
    found = texts_in_place(tokenizer, ids, np.tile([last, other, owl, first], (len(ids), 1)))
    assert found[-1].alternatives == ["🦊(3/3)", " no", "🦉", "⟨F0 9F⟩"]
    assert found[0].alternatives == ["⟨8A⟩", " no", "⟨89⟩", "🦊(1/3)"]


def test_an_alternative_of_byte_fallback_has_its_byte() -> None:
    fallback = with_byte_fallback()
    byte = fallback.convert_tokens_to_ids("<0xF0>")
    (found,) = texts_in_place(fallback, encode(fallback, "the")[:1], np.array([[byte]]))
    assert found.alternatives == ["⟨F0⟩"]


def test_a_token_without_text_has_its_id(tokenizer: PreTrainedTokenizerBase) -> None:
    beyond = 60_000  # a padded embedding matrix has such rows
    ids = np.array([*encode(tokenizer, "a"), beyond])
    found = texts_in_place(tokenizer, ids, np.array([[beyond], [ids[0]]]))
    assert [(piece.text, piece.label, piece.alternatives) for piece in found] == [
        ("a", "a", ["⟨60000⟩"]),
        ("", "⟨60000⟩", ["a"]),
    ]


def test_a_sentencepiece_tokenizer_keeps_the_spaces_between_words() -> None:
    tokenizer = with_byte_fallback()
    words = ["▁the", "▁cat", "s", "<0xF0>", "<0x9F>", "<0xA6>", "<0x8A>", "▁cat"]
    assert own_texts(tokenizer, np.array(tokenizer.convert_tokens_to_ids(words))) == [
        "the", " cat", "s", "🦊", "", "", "", " cat",
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
