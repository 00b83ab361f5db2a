"""The tokenizers of a cache: one folder each, named by the digest of the tokenizer."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from adpa.data.cache.documents import read_document, serialize_document
from adpa.data.cache.files import write_folder
from adpa.data.cache.locations import Location, is_local
from adpa.data.cache.shards import damaged
from adpa.data.vocabulary import digest_tokenizer, load_tokenizer
from adpa.errors import ModelError, RemoteCodeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTENTS = "files.json"


def write_tokenizer(cache: Location, tokenizer: "PreTrainedTokenizerBase", digest: str) -> None:
    """Writes a tokenizer with its chat template into a cache, under ``TokenizerDigests.tokenizer``.

    ``files.json``, which is written last, has the digests of the other files.
    """
    path = cache / "tokenizers" / digest
    if (path / CONTENTS).exists() or (is_local(path) and path.exists()):  # version 1 wrote no digests
        return
    with TemporaryDirectory() as temporary:
        tokenizer.save_pretrained(temporary)
        _write(path, _read_all(Path(temporary)))


def copy_tokenizer(source: Location, target: Location, digest: str) -> None:
    """Writes a tokenizer of one cache into another. The code of a tokenizer is copied, and does not run.

    Raises:
        DamagedFileError: it is missing, or differs from what was written.
    """
    tokenizer = check_tokenizer(source, digest)
    if tokenizer is None:
        _write(target / "tokenizers" / digest, read_contents(source / "tokenizers" / digest))
    else:
        write_tokenizer(target, tokenizer, digest)


def check_tokenizer(cache: Location, digest: str) -> "PreTrainedTokenizerBase | None":
    """The same as ``read_tokenizer``; None for a tokenizer with code, of which only the files are checked.

    Raises:
        DamagedFileError: as for ``read_tokenizer``.
    """
    try:
        return read_tokenizer(cache, digest)
    except RemoteCodeError:
        return None


def read_tokenizer(cache: Location, digest: str, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """Reads a tokenizer from a cache.

    Args:
        cache: the cache.
        digest: its digest.
        trust_remote_code: whether the tokenizer may run Python code from the cache.

    Raises:
        RemoteCodeError: it needs such code, and may not run it.
        DamagedFileError: it is missing, or differs from what was written.
    """
    path = cache / "tokenizers" / digest
    if not re.fullmatch("[0-9a-f]+", digest):  # it comes from a file, and must not lead out of the cache
        raise damaged(path, "not the digest of a tokenizer")
    try:
        files = read_contents(path)
        with TemporaryDirectory() as temporary:
            write_folder(Path(temporary) / digest, files)
            tokenizer = load_tokenizer(Path(temporary) / digest, trust_remote_code)
    except RemoteCodeError as error:
        problem = f"{path}: the tokenizer needs code from its repository, which can do all that you can"
        raise RemoteCodeError(problem, error.args[1]) from error
    except (FileNotFoundError, ModelError) as error:
        raise damaged(path, "not the tokenizer that was written") from error
    if digest_tokenizer(tokenizer).tokenizer != digest:
        raise damaged(path, "not the tokenizer that was written")
    return tokenizer


def _write(path: Location, files: Mapping[str, bytes]) -> None:
    contents = {name: _digest_bytes(content) for name, content in files.items()}
    write_folder(path, {**files, CONTENTS: serialize_document({"files": contents})})


def read_contents(path: Location) -> dict[str, bytes]:
    """The files of a tokenizer, checked against ``files.json``; in version 1, which lacks it, all files unchecked.

    Raises:
        FileNotFoundError: a file is missing.
        DamagedFileError: a file differs from what was written.
    """
    try:
        contents, proved = read_document(path / CONTENTS)
    except FileNotFoundError:  # version 1
        return _read_all(path)
    files = contents.get("files")
    if not proved or not isinstance(files, dict):
        raise damaged(path, f"{CONTENTS} has no digests of files, or no checksum")
    read = {}
    for name, digest in files.items():
        if re.search(r"[\\\0]", name) or not {"", ".", ".."}.isdisjoint(name.split("/")):
            raise damaged(path, f"{CONTENTS} has the name {name!r}, which may lead out of the folder")
        read[name] = (path / name).read_bytes()
        if _digest_bytes(read[name]) != digest:
            raise damaged(path, f"{name} is not what was written")
    return read


def _read_all(folder: Location) -> dict[str, bytes]:
    files: list[Location] = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path)[len(str(folder)) + 1 :]: path.read_bytes() for path in sorted(files, key=str)}


def _digest_bytes(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
