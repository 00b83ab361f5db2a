"""A folder of data files: which belong to which split, as ``datasets`` has it."""

import os
from pathlib import Path

from yaml import YAMLError

from adpa.data.cache.kinds import kind
from adpa.data.columns import printable
from adpa.data.compressed_files import plain_suffix
from adpa.data.file_kinds import READ_FORMATS
from adpa.data.sources import CHECK, FORMAT_OF_SUFFIX
from adpa.errors import DataError


def folder_files(path: Path) -> dict[str, list[Path]]:
    """The files of each split, in the order of their names.

    ``datasets`` finds the splits: ``data/train-00000-of-00002.parquet``, ``test.jsonl``, ``validation/a.csv``; without
    such names all files are ``train``. In a copy of a repository of the Hub, the metadata of its README may name them.

    Raises:
        DataError: the folder has no such files, has files of several formats or configurations, or is something else;
            or the metadata of its README cannot be read.
    """
    if (found := kind(path)) in ("a model", "a cache"):
        raise DataError(f"{path}: it is {found}; expected preference pairs", CHECK)
    if not any(plain_suffix(name) in FORMAT_OF_SUFFIX for *_, names in os.walk(path) for name in names):
        raise _nothing_to_read(path)
    from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns  # takes a second

    try:
        patterns = _described_patterns(path) or get_data_patterns(str(path))
        resolved = DataFilesDict.from_patterns(patterns, base_path=str(path))
    except (EmptyDatasetError, FileNotFoundError):
        resolved = DataFilesDict()
    splits = {}
    for name, files in resolved.items():
        if readable := {path / os.path.relpath(file, path) for file in files if plain_suffix(file) in FORMAT_OF_SUFFIX}:
            splits[str(name)] = sorted(readable)
    if not splits:
        raise _nothing_to_read(path)
    formats = {FORMAT_OF_SUFFIX[plain_suffix(file.name)]: file for files in splits.values() for file in files}
    if len(formats) > 1:
        problem = f"{path}: found files of several formats: {', '.join(sorted(formats))}"
        raise DataError(problem, f"give --data one of them, such as {min(formats.values())}")
    return splits


def _described_patterns(path: Path) -> dict[str, list[str]] | None:
    """The patterns of files by split, as a README of the Hub has them in its metadata; none if it has not."""
    from datasets.data_files import sanitize_patterns
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCardData, metadata_load

    readme = path / "README.md"
    try:
        metadata = (metadata_load(readme) if readme.is_file() else None) or {}
        configs = MetadataConfigs.from_dataset_card_data(DatasetCardData(**metadata))
    except (ValueError, TypeError, YAMLError) as error:
        raise DataError(f"{readme}: its metadata cannot be read", "mend or remove the lines between ---") from error
    name = configs.get_default_config_name()
    if name is None and configs:
        fix = "give --data the folder or the files of one"
        raise DataError(f"{path}: its README.md names several configurations: {printable(configs)}", fix)
    files = configs[name].get("data_files") if name else None
    return sanitize_patterns(files) if files else None


def _nothing_to_read(path: Path) -> DataError:
    names = sorted(each.name for each in path.iterdir())
    found = f"{', '.join(names[:3])}{', …' if len(names) > 3 else ''}" if names else "an empty one"
    expected = f"expected a folder of {READ_FORMATS} files, or one saved by datasets.save_to_disk"
    return DataError(f"{path}: {expected}; found {found}", "give --data a file or such a folder")
