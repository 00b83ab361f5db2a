"""From the name of a model that a user typed to its directory: a local one, or one of the Hub. Imports no torch."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import snapshot_download

from adpa.data.cache.kinds import did_you_mean_path
from adpa.data.hub import HUB_ERRORS, HUB_NAME, NO_HUB_NAME, explain
from adpa.errors import ModelError
from adpa.pipeline.models.weight_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    WEIGHT_PATTERNS,
    check_whole,
    is_quantized,
    read_json,
    whole_weights,
)

HUB_PATTERNS = ["*.json", "*.jinja", "*.model", "*.txt", "README.md", *ADAPTER_WEIGHTS]
OF_TOKENIZERS = re.compile("token|vocab|merges|[.](model|spm|bpe|codes)$")
CHECK = "check the name of the checkpoint"
BASE = ("base_model_name_or_path", "revision")  # the keys of adapter_config.json that say where the base is


def check_models(models: Mapping[str, str]) -> None:
    """Checks that the models that options name are there, with a configuration, whole weights and a tokenizer.

    Args:
        models: the name of each model by its option, such as ``--teacher``.

    Raises:
        ModelError: one is not; the error begins with its option.
    """
    for option, name in models.items():
        try:
            directory, _ = find_directory(name)
            if is_adapter(name, directory):
                find_base(name, directory)
            else:
                check_whole(name, directory)
                _check_tokenizer(name, directory)
        except ModelError as error:
            raise ModelError(f"{option} {error.args[0]}", error.args[1]) from error


def _check_tokenizer(name: str, directory: Path) -> None:
    """Checks that there is a file that some tokenizer may have; only transformers knows which one needs which."""
    files = [path.name for path in directory.iterdir()]
    if not any(OF_TOKENIZERS.search(file) for file in files):
        raise ModelError(f"{name}: found no tokenizer", "save one there with tokenizer.save_pretrained")


def is_here(name: str) -> bool:
    """Whether a name is that of a local directory, or at least cannot be one of the Hub."""
    return os.path.exists(os.path.expanduser(name)) or not _is_hub_name(name)


def is_same(name: str, other: str) -> bool:
    """Whether two names are those of one place."""
    here = [os.path.expanduser(one) for one in (name, other)]
    return name == other or (all(map(os.path.exists, here)) and os.path.samefile(*here))


def find_directory(name: str, with_code: bool = False) -> tuple[Path, str | None]:
    """The directory of a checkpoint, and its commit if it comes from the Hub; ``with_code``: with its Python files.

    Raises:
        ModelError: the checkpoint does not exist, cannot be read, or the Hub does not give it.
    """
    if not name.strip():
        raise ModelError(f"{name!r}: an empty name; expected a directory, or org/name of the Hub")
    directory = Path(os.path.expanduser(name))
    try:
        os.stat(directory)
        if directory.is_dir():
            os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return _ask_hub(name, with_code)
    except (OSError, ValueError) as error:
        shown = name if name.isprintable() else ascii(name)
        reason = getattr(error, "strerror", None) or str(error)
        raise ModelError(f"{shown}: cannot be read: {reason}", CHECK) from error
    if not directory.is_dir():
        meant = did_you_mean_path(directory, "a model") or CHECK
        raise ModelError(f"{name}: it is a file; expected a Hugging Face checkpoint directory", meant)
    return directory.absolute(), None


def is_adapter(name: str, directory: Path) -> bool:
    """Whether a model directory is an adapter, and not whole weights.

    Raises:
        ModelError: it is both. transformers would change the whole weights by the adapter, and say nothing.
    """
    files = [each for each in (ADAPTER_CONFIG, *ADAPTER_WEIGHTS) if (directory / each).is_file()]
    if files and whole_weights(directory):
        raise ModelError(f"{name}: it has whole weights and an adapter ({files[0]})", "merge it or remove it")
    return ADAPTER_CONFIG in files


def find_base(name: str, directory: Path, with_code: bool = False) -> Path:
    """The directory of the base that adapter_config.json names, checked; ``with_code`` as for ``find_directory``.

    Raises:
        ModelError: it names none, or one that is not complete, or an adapter, or quantized weights.
    """
    base, revision = (read_json(name, directory / ADAPTER_CONFIG).get(key) for key in BASE)
    if not isinstance(base, str) or not base:
        raise ModelError(f"{name}: its {ADAPTER_CONFIG} names no base", f"write its {BASE[0]}, or merge the adapter")
    if revision and not Path(base).is_dir():
        base = f"{base}@{revision}"
    try:
        found, _ = find_directory(base, with_code)
        if is_adapter(base, found):
            raise ModelError(f"{base}: it is an adapter itself", f"merge {base} into its own base first")
        check_whole(base, found)
        if is_quantized(base, found):
            raise ModelError(
                f"{base}: its weights are quantized on disk; adapters are merged into weights that are not",
                "name the checkpoint that it was made from",
            )
    except ModelError as error:
        raise ModelError(
            f"{name}: an adapter whose base cannot be used: {error.args[0]}",
            f"{error.args[1] or 'name another base'}; {ADAPTER_CONFIG} names the base, a relative path from the "
            "working directory",
        ) from error
    return found


def _ask_hub(name: str, with_code: bool) -> tuple[Path, str]:
    hub_name, at, revision = name.partition("@")
    meant = did_you_mean_path(Path(os.path.expanduser(name)), "a model")
    missing = f"{name if name.isprintable() else ascii(name)}: no such directory"
    if url := re.fullmatch(r"(?:https?|hf)://(?:huggingface\.co/)?([^/]+/[^/]+)(/.*)?", name):
        raise ModelError(f"{missing}; a model of the Hub is named org/name[@revision]", f"did you mean {url[1]}?")
    if name.startswith(("/", ".", "~")):
        raise ModelError(missing, meant or CHECK)
    if not _is_hub_name(name):
        raise ModelError(f"{missing}, and {NO_HUB_NAME} (org/name[@revision])", meant or CHECK)
    if at and not revision:
        raise ModelError(f"{missing}; found no revision after @", "name one, or leave @ out")
    try:
        for weights in WEIGHT_PATTERNS:  # the second only if the first has no file
            patterns = [*HUB_PATTERNS, *(["*.py"] if with_code else []), weights]
            directory = Path(snapshot_download(hub_name, revision=revision or None, allow_patterns=patterns))
            if whole_weights(directory):
                break
    except HUB_ERRORS as error:
        problem, fix = explain(error, hub_name, CHECK)
        raise ModelError(f"{missing}, and {problem}", meant or fix) from error
    return directory.absolute(), directory.name


def _is_hub_name(name: str) -> bool:
    return HUB_NAME.fullmatch(name.partition("@")[0]) is not None
