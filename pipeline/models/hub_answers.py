"""Names of the Hub, and what its errors mean."""

import re

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

HUB_NAME = re.compile(r"(?:[\w-][\w.-]*/)?[\w-][\w.-]{0,95}", re.ASCII)
HTTP_ERROR: type[Exception] = HfHubHTTPError.__mro__[1]  # of the library beneath, which depends on the version
HUB_ERRORS = (HFValidationError, HTTP_ERROR, OSError)
NO_HUB_NAME = "no name that the Hub can have"


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
