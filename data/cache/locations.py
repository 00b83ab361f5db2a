"""Where a cache lies: a local directory, or an address of an object store such as ``s3://bucket/folder``."""

import os
from pathlib import Path
from typing import TypeAlias

from upath import UPath

Location: TypeAlias = Path | UPath


def copies_folder() -> Path:
    """Where files of object stores are kept for reading: ``$ADPA_HOME/files``; it may be deleted at any time."""
    return Path(os.environ.get("ADPA_HOME") or Path.home() / ".cache" / "adpa") / "files"
