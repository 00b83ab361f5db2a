"""Small JSON files with a checksum: reading one checks every byte.

The last field of a document is ``checksum``, the digest of the others. A document has exactly one serialized form. So a
reader serializes it again, and detects any changed byte, blanks included.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from adpa.data.cache.files import write_file
from adpa.data.cache.locations import Location
from adpa.data.cache.shards import damaged

SIZE_LIMIT = 1 << 20


def write_document(path: Location, fields: Mapping[str, Any]) -> None:
    """Writes a document: these fields and their checksum."""
    write_file(path, serialize_document(fields))


def serialize_document(fields: Mapping[str, Any]) -> bytes:
    """The bytes of a document: these fields and their checksum."""
    return _canonical({**fields, "checksum": hashlib.blake2b(_canonical(fields), digest_size=16).hexdigest()})


def read_document(path: Location) -> tuple[dict[str, Any], bool]:
    """Reads a document, or a plain JSON object without a checksum.

    Returns:
        The fields without the checksum, and whether a checksum confirmed them.

    Raises:
        FileNotFoundError: it does not exist.
        DamagedFileError: it is larger than ``SIZE_LIMIT``, is not a JSON object, or does not match its checksum.
    """
    with path.open("rb") as file:
        content = file.read(SIZE_LIMIT + 1)
    if len(content) > SIZE_LIMIT:
        raise damaged(path, f"has more than {SIZE_LIMIT:,} bytes")
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise damaged(path, "not a JSON object")
    if "checksum" not in fields:
        return fields, False
    del fields["checksum"]
    if serialize_document(fields) != content:
        raise damaged(path, "its bytes do not match its checksum")
    return fields, True


def _canonical(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, indent=2).encode() + b"\n"
