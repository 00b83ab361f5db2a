"""Rules of tokenizers: loading, digests, equal vocabularies."""

import hashlib
import json
import re
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adpa.errors import ModelError, RemoteCodeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# A text with all that tokenizers have rules for.
PROBE = "In 2024, 12345 people's naïve café wasn't OK!\n\n  def f(x):\n\treturn x + 1  # 你好 🙂\n   12 ⅔ cups http://a.b/c?d=e"


@dataclass(frozen=True)
class TokenizerDigests:
    """Digests of a tokenizer: of all of it, of its vocabulary, and of its chat template."""

    tokenizer: str
    vocabulary: str
    chat_template: str


def load_tokenizer(directory: Path, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """Loads the tokenizer of a checkpoint directory.

    transformers takes a class by the model's type or by the name in tokenizer_config.json. The class may have other
    rules than tokenizer.json. Then the file decides, unless a class that tokenizer_config.json names loses text: such a
    tokenizer is refused by ``check_round_trip``.

    Args:
        directory: the directory.
        trust_remote_code: whether the tokenizer may run Python code from the directory.

    Raises:
        RemoteCodeError: it needs such code, and may not run it.
        ModelError: it has none, or it cannot be loaded.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # import torch, which few readers of a cache need

    has_file, names_no_class = (directory / "tokenizer.json").is_file(), _names_no_class(directory)
    try:
        tokenizer = _load(AutoTokenizer, directory, trust_remote_code)
    except ModelError:
        if not has_file or not names_no_class:
            raise
        return _load(PreTrainedTokenizerFast, directory)
    own_class = hasattr(tokenizer, "backend_tokenizer") and type(tokenizer) is not PreTrainedTokenizerFast
    if not own_class or not has_file or _code(tokenizer):
        return tokenizer
    described = _load(PreTrainedTokenizerFast, directory)
    ids, published = (each(PROBE, add_special_tokens=False)["input_ids"] for each in (tokenizer, described))
    keeps_text = str(described.decode(published)).strip() == str(tokenizer.decode(ids)).strip()
    return described if ids != published and (names_no_class or keeps_text) else tokenizer


def _load(tokenizer_class: Any, directory: Path, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    try:
        loaded: PreTrainedTokenizerBase = tokenizer_class.from_pretrained(
            directory, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # a broken tokenizer.json is a bare Exception of the package tokenizers
        if "trust_remote_code" in str(error) and not trust_remote_code:
            raise RemoteCodeError(
                f"{directory}: its tokenizer needs code from its repository, which can do all that you can",
                "read it, then add --trust-remote-code",
            ) from error
        fix = "save one there with tokenizer.save_pretrained"
        if (directory / "tokenizer.json").is_file():  # a class that does not fit to the file fails in many ways
            fix += ', or set "tokenizer_class": "PreTrainedTokenizerFast" in its tokenizer_config.json'
        raise ModelError(
            f"{directory}: no tokenizer could be loaded ({str(error).partition(chr(10))[0]})", fix
        ) from error
    return loaded


def _names_no_class(directory: Path) -> bool:
    """Whether tokenizer_config.json leaves the rules to tokenizer.json."""
    try:
        named = json.loads((directory / "tokenizer_config.json").read_text()).get("tokenizer_class")
    except (OSError, ValueError, AttributeError):  # transformers says what is wrong with it
        return False
    return named in ("PreTrainedTokenizerFast", "TokenizersBackend")


def token_ids(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text: those of ``tokenizer(texts, add_special_tokens=False)``, sooner.

    The tokenizer looks for its special tokens first, and takes the text between them piece by piece. So texts are cut
    before their special tokens, and equal pieces are encoded once: the turns that a prompt shares with its responses.
    """
    from transformers import PreTrainedTokenizerFast

    stock = all(
        getattr(type(tokenizer), name, None) is getattr(PreTrainedTokenizerFast, name)
        for name in ("__call__", "_encode_plus", "_convert_encoding")
    )
    if not stock:
        if not texts:  # some classes fail
            return []
        return [list(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = tokenizer.split_special_tokens  # the call sets these three as well
    backend.no_truncation()
    backend.no_padding()
    cuts = _cuts(tokenizer)
    pieces = [cuts.split(text) for text in texts]
    distinct = list(dict.fromkeys(piece for parts in pieces for piece in parts))
    encodings = backend.encode_batch_fast(distinct, add_special_tokens=False)
    ids = {piece: encoding.ids for piece, encoding in zip(distinct, encodings, strict=True)}
    return [[token for piece in parts for token in ids[piece]] for parts in pieces]


def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> frozenset[str]:
    """The tokens that a tokenizer marks as special, those without a name of their own too."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return frozenset(added | {*tokenizer.all_special_tokens} - {""})


def matching_any(tokens: Collection[str]) -> re.Pattern[str]:
    """Matches any of the tokens; the look at the first character makes the search fast where there is none."""
    if not tokens:
        return re.compile("(?!)")
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))
    first = "".join(sorted({re.escape(token[0]) for token in tokens}))
    return re.compile(f"(?=[{first}])(?:{'|'.join(map(re.escape, longest_first))})")


def _cuts(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str]:
    """The places before special tokens that split a text in two without a change of its tokens.

    A token makes no cut if it takes the white space before it, if it is looked for in normalized text, or if another
    added token has its first character inside, so that it could reach over the cut. A token that has to be a single
    word looks at its neighbors.
    """
    never = re.compile("(?!)")
    added = tokenizer.added_tokens_decoder.values()
    if tokenizer.split_special_tokens or any(token.single_word for token in added):
        return never
    inside = {"", *(character for token in added for character in token.content[1:])}
    names = [
        token.content
        for token in added
        if token.special and not (token.lstrip or token.normalized) and token.content[:1] not in inside
    ]
    if not names:
        return never
    first = "".join({re.escape(name[0]) for name in names})
    return re.compile(f"(?=[{first}])(?={'|'.join(map(re.escape, names))})")


def digest_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> TokenizerDigests:
    """The digests of a tokenizer's behaviour; they do not depend on the directory that it was loaded from."""
    vocabulary = _digest(sorted(tokenizer.get_vocab().items()))
    chat_template = _digest([tokenizer.chat_template, sorted(map(repr, tokenizer.special_tokens_map.items()))])
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else type(tokenizer).__name__
    if isinstance(rules, dict):
        rules |= {"truncation": None, "padding": None}  # earlier calls of the tokenizer may have set these
    if code := _code(tokenizer):
        rules = [rules, code]
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


def _code(tokenizer: "PreTrainedTokenizerBase") -> dict[str, str]:
    """The Python files from its repository that a tokenizer runs, by name; none for a class of transformers."""
    from transformers.dynamic_module_utils import get_relative_import_files

    module = type(tokenizer).__module__
    if not module.startswith("transformers_modules."):
        return {}
    file = str(sys.modules[module].__file__)
    return {path.name: path.read_text() for path in map(Path, [file, *get_relative_import_files(file)])}


def _digest(value: object) -> str:
    canonical = json.dumps(value, ensure_ascii=False, sort_keys=True)
    return hashlib.blake2b(canonical.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
