"""Rules of tokenizers: loading, digests, equal vocabularies."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adpa.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenizerDigests:
    """Digests of a tokenizer: of all of it, of its vocabulary, and of its chat template."""

    tokenizer: str
    vocabulary: str
    chat_template: str


def load_tokenizer(directory: Path) -> "PreTrainedTokenizerBase":
    """Loads the tokenizer of a checkpoint directory.

    Raises:
        ModelError: it has none, or it cannot be loaded.
    """
    from transformers import AutoTokenizer  # imports torch, which most readers of a cache do not need

    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)  # and do not ask the user
    except Exception as error:  # a broken tokenizer.json is a bare Exception of the package tokenizers
        raise ModelError(
            f"{directory}: no tokenizer could be loaded ({str(error).partition(chr(10))[0]})",
            "save one there with tokenizer.save_pretrained",
        ) from error


def digest_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> TokenizerDigests:
    """The digests of a tokenizer's behaviour; they do not depend on the directory that it was loaded from."""
    vocabulary = _digest(sorted(tokenizer.get_vocab().items()))
    chat_template = _digest([tokenizer.chat_template, sorted(map(repr, tokenizer.special_tokens_map.items()))])
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else type(tokenizer).__name__
    if isinstance(rules, dict):
        rules |= {"truncation": None, "padding": None}  # earlier calls of the tokenizer may have set these
    return TokenizerDigests(_digest([rules, vocabulary, chat_template]), vocabulary, chat_template)


def check_same_vocabulary(
    teacher: "PreTrainedTokenizerBase", other: "PreTrainedTokenizerBase", teacher_name: str, other_name: str
) -> None:
    """Checks that every token of the teacher has the same id in another tokenizer, which may have more tokens.

    Raises:
        ModelError: a token differs; it names the first one.
    """
    other_vocabulary = other.get_vocab()
    for token, index in sorted(teacher.get_vocab().items(), key=lambda item: item[1]):
        other_id = other_vocabulary.get(token)
        if other_id != index:
            raise ModelError(
                f"{teacher_name} and {other_name} have different vocabularies: the token {token!r} has the id "
                f"{index} in the first and {'no id' if other_id is None else other_id} in the second",
                "use models that share one tokenizer",
            )


def _digest(value: object) -> str:
    canonical = json.dumps(value, ensure_ascii=False, sort_keys=True)
    return hashlib.blake2b(canonical.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


