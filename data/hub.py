"""Names of the Hub, and what its errors mean."""

import os
import re
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from adpa.data.sources import did_you_mean_file
from adpa.errors import DataError

HUB_NAME = re.compile(r"(?:[\w-][\w.-]*/)?[\w-][\w.-]{0,95}", re.ASCII)
HTTP_ERROR: type[Exception] = HfHubHTTPError.__mro__[1]  # of the library beneath, which depends on the version
HUB_ERRORS = (HFValidationError, HTTP_ERROR, OSError)
NO_HUB_NAME = "no name that the Hub can have"
SECONDS = 10  # to wait for an answer


def explain(error: Exception, name: str, check: str) -> tuple[str, str]:
    """What an error of the Hub means, as the end of a sentence, and what to do.

    Args:
        error: one of ``HUB_ERRORS``.
        name: the name on the Hub, without a revision.
        check: what to do about a wrong name.
    """
    if isinstance(error, HFValidationError):
        return NO_HUB_NAME, check
    if isinstance(error, GatedRepoError):
        return "its owner on the Hub must let you read it", f"ask for it on the page of {name}, then run hf auth login"
    if isinstance(error, RepositoryNotFoundError):
        return f"the Hub has no {name} that you may read", f"{check}; if it is private, run hf auth login"
    if isinstance(error, RevisionNotFoundError):
        return f"the Hub has no such revision of {name}", "check what follows @"
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    if response is not None:
        fix = "run hf auth login" if response.status_code in (401, 403) else "try again later"
        return f"the Hub answers with status {response.status_code}", fix
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE keeps adpa from asking the Hub", f"{check}, or unset HF_HUB_OFFLINE"
    if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled | HTTP_ERROR):
        return "the Hub cannot be reached", f"{check}, and the network"
    return f"the Hub does not give it ({' '.join(str(error).split())})", check


def check_hub_data(name: str) -> None:
    """Checks that the Hub has a data set, or that a copy is there; ``datasets`` itself would try for half a minute.

    Raises:
        DataError: it has not, or cannot be asked.
    """
    missing = f"{name}: no such file or directory"
    if not HUB_NAME.fullmatch(name):
        raise DataError(f"{missing}, and {NO_HUB_NAME}", "check --data")
    try:
        HfApi().dataset_info(name, timeout=SECONDS)
    except HUB_ERRORS as error:
        if not _is_cached(name):
            problem, fix = explain(error, name, "check --data")
            raise DataError(f"{missing}, and {problem}", did_you_mean_file(Path(name)) or fix) from error


def _is_cached(name: str) -> bool:
    """Whether ``datasets`` has a copy, in whatever case it writes the name."""

    def plain(text: str) -> str:
        return text.replace("_", "").lower()

    folder = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")
    names = os.listdir(folder) if folder.is_dir() else []
    return plain(name.replace("/", "___")) in map(plain, names)
