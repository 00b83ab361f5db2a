"""Compares texts with their tokens: a tokenizer with the wrong rules loses text in silence.

A text comes back if its ids decode to it, without unknown tokens. Two differences do not count: the tokenizer's own
normalization, and white space at the two ends. A tokenizer that was loaded as another class than its ``tokenizer.json``
describes has to give the ids of that file as well.
"""

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, pre_tokenizers

from adpa.data.vocabulary import matching_any, special_tokens, token_ids
from adpa.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ONE_IN = 100  # texts; a tokenizer that loses more is wrong itself
SHOWN = 40  # characters of a text in a message
SENTENCEPIECE_BLANK = "\u2581"
RULES = ("normalizer", "pre_tokenizer", "decoder")


def check_round_trip(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> dict[str, str]:
    """The texts that do not come back, each with the reason, if they are few.

    Raises:
        ModelError: two or more texts are lost, and at least one in a hundred of the distinct ones; or the tokenizer
            splits text at random.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if getattr(getattr(backend, "model", None), "dropout", None):
        raise ModelError(
            f"{tokenizer.name_or_path}: the tokenizer splits text at random (dropout {backend.model.dropout:g})",
            "set the dropout of the model in its tokenizer.json to null",
        )
    losses = find_losses(tokenizer, texts)
    distinct = len(set(texts))
    if len(losses) < 2 or len(losses) * ONE_IN < distinct:
        return losses
    text, reason = next(iter(losses.items()))
    cause, fix = _cause(tokenizer, text)
    raise ModelError(
        f"{tokenizer.name_or_path or type(tokenizer).__name__}: the tokenizer gets {len(losses):,} of {distinct:,} "
        f"texts of the data wrong{cause}; the first one, {_beginning(text)!r}, {reason}",
        fix,
    )


def find_losses(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> dict[str, str]:
    """Those of the distinct texts that do not come back, each with the reason in a few words."""
    distinct = list(dict.fromkeys(texts))
    normalize, special = _normalization(tokenizer), matching_any(special_tokens(tokenizer))
    losses = {}
    for text, ids in zip(distinct, token_ids(tokenizer, distinct), strict=True):
        decoded = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        said, comes_back = normalize(text), normalize(str(decoded))
        if said != comes_back and special.search(text):  # it may take the white space beside it, or add some
            said, comes_back = ("".join(part.split()) for part in (said, comes_back))
        if ids.count(tokenizer.unk_token_id) > text.count(tokenizer.unk_token or text):
            losses[text] = f"has the unknown token{_unknown_place(tokenizer, text)}"
        elif said != comes_back:
            losses[text] = _difference(said, comes_back)
    described = _described(tokenizer)
    if described is not None:
        plain = [text for text in distinct if text not in losses and not special.search(text)]
        losses |= dict.fromkeys(
            _tokenized_otherwise(tokenizer, described, plain), "has other tokens by its tokenizer.json"
        )
    return losses


def lost_bytes(tokenizer: "PreTrainedTokenizerBase") -> bytes:
    """The bytes of UTF-8 that a byte-level vocabulary has no token for. It loses them in silence."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or b'"ByteLevel"' not in (_state(backend, "pre_tokenizer") or b""):
        return b""
    vocabulary = tokenizer.get_vocab()
    # GPT-2's alphabet: printable bytes are their own characters, the others follow from 256 on.
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    possible = {*range(0xC0), *range(0xC2, 0xF5)}
    return bytes(sorted(byte for byte in possible if characters[byte] not in vocabulary))


def _tokenized_otherwise(
    tokenizer: "PreTrainedTokenizerBase", described: Tokenizer, texts: Sequence[str]
) -> Iterator[str]:
    """The texts to which another tokenizer gives other ids, white space at their ends aside."""
    stripped = [text.strip() for text in texts]
    expected = described.encode_batch_fast(stripped, add_special_tokens=False)
    for text, ids, encoding in zip(texts, token_ids(tokenizer, stripped), expected, strict=True):
        if ids != encoding.ids:
            yield text


def _normalization(tokenizer: "PreTrainedTokenizerBase") -> Callable[[str], str]:
    """What a tokenizer may change in a text: a function that gives equal results before and after such a change."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # SentencePiece normalizes so, by default
        return lambda text: " ".join(unicodedata.normalize("NFKC", text).split())
    normalizer = backend.normalizer
    change: Callable[[str], str] = normalizer.normalize_str if normalizer else str
    blank, newline = _split(change("a b"), backend), _split(change("a\nb"), backend)
    if blank == "ab":
        return lambda text: "".join(change(text).split())
    if newline in ("ab", blank):
        return lambda text: " ".join(_blanks(change(text)).split())
    if SENTENCEPIECE_BLANK in blank:
        return lambda text: _blanks(change(text.strip())).strip()
    return lambda text: change(text.strip()).strip()


def _blanks(text: str) -> str:
    return text.replace(SENTENCEPIECE_BLANK, " ")


def _split(text: str, backend: Tokenizer) -> str:
    """What the pre-tokenizer keeps of a text."""
    if backend.pre_tokenizer is None:
        return text
    return "".join(piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text))


def _described(tokenizer: "PreTrainedTokenizerBase") -> Tokenizer | None:
    """The tokenizer of ``tokenizer.json``, unless it is the one that was loaded.

    From the file, transformers gives a class like ``LlamaTokenizer`` the vocabulary only; the class has its own rules.
    """
    from transformers import PreTrainedTokenizerFast

    file = Path(tokenizer.name_or_path) / "tokenizer.json"
    own_class = hasattr(tokenizer, "backend_tokenizer") and type(tokenizer) is not PreTrainedTokenizerFast
    if not own_class or not tokenizer.name_or_path or not file.is_file():
        return None
    described = Tokenizer.from_file(str(file))
    described.no_truncation()
    described.no_padding()
    return described


def _cause(tokenizer: "PreTrainedTokenizerBase", text: str) -> tuple[str, str]:
    """Why a text is lost, where it is known, and what to do."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    described = _described(tokenizer)
    if described is not None and list(_tokenized_otherwise(tokenizer, described, [text])):
        changed = [rule for rule in RULES if _state(described, rule) != _state(backend, rule)]
        return (
            f": transformers loads it as {type(tokenizer).__name__}, and this class replaces the "
            f"{', '.join(changed) or 'model'} of its tokenizer.json",
            'set "tokenizer_class": "PreTrainedTokenizerFast" in its tokenizer_config.json',
        )
    if backend is not None and backend.decoder is None and _split("a b", backend) != "ab":
        return ": its tokenizer.json has no decoder", "set the decoder that fits its pre_tokenizer"
    bytewise = backend is not None and b'"ByteLevel"' in (_state(backend, "pre_tokenizer") or b"")
    if bytewise and (missing := set(pre_tokenizers.ByteLevel.alphabet()) - set(tokenizer.get_vocab())):
        return f": its vocabulary lacks {len(missing)} of the 256 bytes", "use another model, or data without them"
    return "", "take the tokenizer files of the model's publisher, or use a model whose vocabulary fits the data"


def _state(backend: Tokenizer, rule: str) -> bytes | None:
    part = getattr(backend, rule)
    return part.__getstate__() if part is not None else None


def _unknown_place(tokenizer: "PreTrainedTokenizerBase", text: str) -> str:
    """Where the first unknown token lies, if the tokenizer tells."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        return ""
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    spans = zip(encoding.ids, encoding.offsets, strict=True)
    unknown = (text[slice(*span)] for index, span in spans if index == tokenizer.unk_token_id)
    return f" at {_beginning(next(part for part in unknown if part != tokenizer.unk_token))!r}"


def _difference(said: str, comes_back: str) -> str:
    """The two texts, or their parts around the first place that differs if they are long."""
    if len(said) <= SHOWN:
        return f"comes back as {_beginning(comes_back)!r}"
    pairs = enumerate(zip(said, comes_back, strict=False))
    place = next((place for place, (one, other) in pairs if one != other), min(len(said), len(comes_back)))
    part = slice(max(0, place - SHOWN // 2), place + SHOWN // 2)
    return f"has {said[part]!r}, which comes back as {comes_back[part]!r}"


def _beginning(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"
