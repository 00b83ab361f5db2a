"""Whether the Hub can be asked for a data set: answered at once, before ``datasets`` tries for half a minute."""

import os
import urllib.error
import urllib.request
from pathlib import Path
from ssl import SSLError

from huggingface_hub import constants

from adpa.data.file_kinds import READ_FORMATS
from adpa.data.sources import near_file
from adpa.errors import DataError

SECONDS = 3  # to wait for an answer


def check_hub_data(name: str) -> None:
    """Checks at once that the Hub answers, or that a copy of the data set is in its local cache.

    Raises:
        DataError: neither.
    """
    problem = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _unreachable(constants.ENDPOINT)
    if not problem or _is_cached(name, Path(constants.HF_HOME)):
        return
    near = near_file(Path(name))
    raise DataError(
        f"{name}: no such file or directory, and the Hub cannot be asked: offline ({problem})",
        near or f"give --data a {READ_FORMATS} file, or connect",
    )


def _unreachable(address: str) -> str:
    """Why a server gives no answer; empty if it gives one, even an error."""
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=SECONDS).close()
    except urllib.error.HTTPError:
        return ""
    except urllib.error.URLError as error:
        if isinstance(error.reason, SSLError):
            return ""  # another program may trust the server
        return getattr(error.reason, "strerror", None) or str(error.reason)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _is_cached(name: str, home: Path) -> bool:
    def plain(folder: str) -> str:
        return folder.replace("_", "").lower()

    folder = Path(os.environ.get("HF_DATASETS_CACHE") or home / "datasets")
    return folder.is_dir() and plain(name.replace("/", "")) in {plain(each.name) for each in folder.iterdir()}
