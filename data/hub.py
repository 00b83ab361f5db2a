"""Names of the Hub, and what its errors mean."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

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
from pyarrow import ArrowException

from adpa.data.columns import printable
from adpa.data.sources import did_you_mean_file
from adpa.errors import DataError, did_you_mean

if TYPE_CHECKING:
    from datasets import DatasetDict

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


@dataclass(frozen=True)
class HubData:
    """A data set on the Hub, as ``--data`` names it: ``name``, ``name:config`` or ``name@revision``, or all three."""

    name: str
    config: str | None
    revision: str | None


def parse_hub_data(source: str) -> HubData:
    """Reads the name of a data set, with its configuration after ``:`` and its revision after ``@``.

    Raises:
        DataError: it is no name that the Hub can have.
    """
    found = re.fullmatch(r"([^@:]*)(?::([^@:]+))?(?:@([^@:]+))?(?::([^@:]+))?", source)
    if found is None or not HUB_NAME.fullmatch(found[1]) or (found[2] and found[4]):
        raise DataError(f"{source}: no such file or directory, and {NO_HUB_NAME}", "check --data")
    return HubData(found[1], found[2] or found[4], found[3])


def check_hub_data(source: str) -> HubData:
    """Checks that the Hub has a data set, or that a copy is there; ``datasets`` itself would try for half a minute.

    Raises:
        DataError: it has not, or cannot be asked.
    """
    data = parse_hub_data(source)
    try:
        HfApi().dataset_info(data.name, revision=data.revision, timeout=SECONDS)
    except HUB_ERRORS as error:
        if not _is_cached(data.name):
            problem, fix = explain(error, data.name, "check --data")
            fix = did_you_mean_file(Path(source)) or fix
            raise DataError(f"{source}: no such file or directory, and {problem}", fix) from error
    return data


def load_hub_data(source: str) -> "DatasetDict":
    """Loads all splits of a data set.

    Raises:
        DataError: the Hub does not have it, has several configurations and none is named, or does not give it.
    """
    data = check_hub_data(source)
    from datasets import load_dataset  # takes a second
    from datasets.exceptions import DatasetsError

    try:
        return load_dataset(data.name, data.config, revision=data.revision)
    except (DatasetsError, OSError, ValueError, RuntimeError, ArrowException) as error:
        if wrong := _wrong_config(source, data):
            raise wrong from error
        problem = f"the Hub does not give it ({' '.join(str(error).split())})"
        raise DataError(f"{source}: no such file or directory, and {problem}", "check --data") from error


def _wrong_config(source: str, data: HubData) -> DataError | None:
    """The error for a configuration that is not there, or is not named; none if that is not what is wrong."""
    from datasets import get_dataset_config_names
    from datasets.exceptions import DatasetsError

    try:
        names = get_dataset_config_names(data.name, revision=data.revision)
    except (DatasetsError, OSError, ValueError, RuntimeError):
        return None
    if data.config in names or (data.config is None and len(names) < 2):
        return None
    found = "no configuration" if data.config is None else f"the configuration {data.config}"
    near = did_you_mean(data.config or "", names) or f"name it as in {source.partition(':')[0]}:{names[0]}"
    return DataError(f"{source}: found {found}; expected one of {printable(names)}", near)


def _is_cached(name: str) -> bool:
    """Whether ``datasets`` has a copy, in whatever case it writes the name."""

    def plain(text: str) -> str:
        return text.replace("_", "").lower()

    folder = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")
    names = os.listdir(folder) if folder.is_dir() else []
    return plain(name.replace("/", "___")) in map(plain, names)
