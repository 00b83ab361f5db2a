"""Reads preference pairs from files, directories and the Hub into one form.

A row has ``prompt``, ``chosen`` and ``rejected``, each chat messages or a string. Without ``prompt``, ``chosen`` and
``rejected`` are whole conversations, and the messages that both begin with are the prompt. A string is one message: the
user's for a prompt, the assistant's for a response.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetNotFoundError

from adpa.errors import DataError

Message = dict[str, Any]

FILE_SUFFIXES = (".jsonl", ".json", ".parquet")
PROMPT_ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class PreferencePair:
    """A prompt, the preferred response and the other one.

    Attributes:
        where: the source of the pair, for messages: a file and its line, or a row number.
        example_id: digest of the pair's content; the same pair has the same id in any file.
        prompt: the messages before the response; the last is not the assistant's.
        chosen: the preferred response's text.
        rejected: the other response's text.
    """

    where: str
    example_id: str
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str


def read_rows(source: str, split: str | None = None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields (where, row) for every row of a JSONL, JSON or Parquet file, a ``datasets`` directory, or a Hub dataset.

    Raises:
        DataError: the source does not exist, cannot be read, or has no rows.
    """
    path = Path(source)
    if path.is_file():
        if split is not None:
            raise DataError(f"{source}: found --split {split}; a file has no splits", "leave --split out")
        rows = _read_file(path)
    elif path.is_dir():
        rows = _number_rows(source, _read_directory(path, split))
    elif path.suffix in FILE_SUFFIXES or source.startswith((".", "/", "~")):
        raise DataError(f"{source}: no such file or directory", "check --data")
    else:
        rows = _number_rows(source, _read_hub(source, split))
    empty = True
    try:
        for where, row in rows:
            empty = False
            yield where, row
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: expected UTF-8 text; {error.reason}", "check --data") from error
    if empty:
        raise DataError(f"{source}: found no rows; expected at least one preference pair", "check --data")


def parse_pair(where: str, row: Mapping[str, Any]) -> PreferencePair:
    """Turns one row of any of the supported forms into a ``PreferencePair``.

    Raises:
        DataError: a column is missing, a role is wrong, a response is empty, or prompt and responses do not agree.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: found a {type(row).__name__}; expected an object with `chosen` and `rejected`")
    for column in ("chosen", "rejected"):
        if row.get(column) is None:
            raise DataError(
                f"{where}: found the columns {', '.join(row)}; expected `{column}`",
                "name the columns prompt, chosen and rejected",
            )
    chosen = _messages(where, "chosen", row["chosen"], "assistant")
    rejected = _messages(where, "rejected", row["rejected"], "assistant")
    shared = _shared_prefix(chosen, rejected)
    prompt = _prompt(where, row.get("prompt"), shared)
    for column, conversation in (("chosen", chosen), ("rejected", rejected)):
        _check_response(where, column, conversation[len(shared) :])
    chosen_text, rejected_text = chosen[-1]["content"], rejected[-1]["content"]
    identity = json.dumps([prompt, chosen_text, rejected_text], ensure_ascii=False, sort_keys=True)
    try:
        example_id = hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: the text has half of a surrogate pair, {identity[error.start]!r}, which is no character",
            "mend the row, or pass --drop-invalid",
        ) from error
    return PreferencePair(where, example_id, tuple(prompt), chosen_text, rejected_text)


def _read_file(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if path.suffix == ".parquet":
        try:
            table = pq.read_table(path)
        except (pa.ArrowInvalid, pa.ArrowIOError) as error:
            raise DataError(f"{path}: expected a Parquet file; {_first_line(error)}", "check --data") from error
        yield from _number_rows(str(path), Dataset(table))
    elif path.suffix == ".json" and _is_json_list(path):
        for number, row in enumerate(_parse_json(path, path.read_text(encoding="utf-8-sig")), start=1):
            yield f"{path} row {number}", row
    else:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{path} line {number}", _parse_json(path, line.rstrip(), number)


def _is_json_list(path: Path) -> bool:
    with path.open(encoding="utf-8-sig") as file:
        return file.read(4096).lstrip().startswith("[")


def _parse_json(path: Path, text: str, first_line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path} line {first_line + error.lineno - 1}"
        raise DataError(f"{where}: broken JSON: {error.msg} at column {error.colno}", "mend the file") from error


def _number_rows(source: str, dataset: Dataset) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, row in enumerate(dataset, start=1):
        yield f"{source} row {number}", row


def _read_directory(path: Path, split: str | None) -> Dataset:
    try:
        return _pick_split(str(path), load_from_disk(str(path)), split)
    except (FileNotFoundError, IndexError, pa.ArrowException) as error:  # IndexError: it was saved without a row
        raise DataError(
            f"{path}: expected a directory saved by datasets.save_to_disk, with at least one row",
            "or give --data one file",
        ) from error


def _read_hub(name: str, split: str | None) -> Dataset:
    try:
        return _pick_split(name, load_dataset(name), split)
    except (DatasetNotFoundError, ConnectionError, FileNotFoundError, ValueError) as error:
        raise DataError(
            f"{name}: no such file or directory, and the Hub does not give it ({_first_line(error)})", "check --data"
        ) from error


def _pick_split(source: str, dataset: Dataset | DatasetDict, split: str | None) -> Dataset:
    if isinstance(dataset, Dataset):
        if split is not None:
            raise DataError(f"{source}: found --split {split}; this data set has no splits", "leave --split out")
        return dataset
    names = list(dataset)
    if split is None and len(names) == 1:
        split = names[0]
    if split not in dataset:
        choice = "no --split" if split is None else f"--split {split}"
        raise DataError(f"{source}: found {choice}; expected one of {', '.join(names)}", "name it with --split")
    return dataset[split]


def _messages(where: str, column: str, value: Any, role: str) -> list[Message]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: `{column}` is {value!r:.60}; expected chat messages or a string")
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise DataError(
                f"{where}: `{column}` has the message {message!r:.80}; "
                "expected an object with `role` and `content`, both strings"
            )
        if message.get("role") not in PROMPT_ROLES:
            raise DataError(
                f"{where}: `{column}` has a message with the role {message.get('role')!r}; "
                f"expected one of {', '.join(PROMPT_ROLES)}"
            )
        if message.get("tool_calls"):
            raise DataError(f"{where}: `{column}` has a message with tool calls, which are not supported")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _shared_prefix(chosen: list[Message], rejected: list[Message]) -> list[Message]:
    length = 0
    while length < min(len(chosen), len(rejected)) - 1 and chosen[length] == rejected[length]:
        length += 1
    return chosen[:length]


def _prompt(where: str, value: Any, shared: list[Message]) -> list[Message]:
    if value is None or value == []:
        prompt = shared
        if not prompt:
            raise DataError(
                f"{where}: found no `prompt`, and `chosen` and `rejected` share no messages",
                "add `prompt`, or make both whole conversations with the same beginning",
            )
    else:
        prompt = _messages(where, "prompt", value, "user")
        if shared and isinstance(value, str) and any(message["content"] == value for message in shared):
            prompt = shared
        elif shared and prompt != shared:
            raise DataError(
                f"{where}: `prompt` is not what `chosen` and `rejected` begin with",
                "drop `prompt`, or leave only the response in `chosen` and `rejected`",
            )
    if prompt[-1]["role"] == "assistant":
        raise DataError(f"{where}: the prompt ends with the assistant's message; expected the user's")
    return prompt


def _check_response(where: str, column: str, response: list[Message]) -> None:
    roles = [message["role"] for message in response]
    if roles != ["assistant"]:
        raise DataError(
            f"{where}: after the prompt, `{column}` has messages of {', '.join(roles)}; "
            "expected one message of the assistant"
        )
    if not response[0]["content"].strip():
        raise DataError(f"{where}: `{column}` is an empty response", "remove the row, or pass --drop-invalid")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
