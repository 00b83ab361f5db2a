"""Response sets: prompts and responses as tokens, and how they were made.

A set is one shard, ``CACHE/responses/<name>-<id>-<digest of the file's bytes>.arrow``. Its id is the digest of its rows
and of how it was made. So the same responses to the same prompts are the same set, whatever the order of the data.

Beside its rows a file has the record of the run that last wrote it. Of several files of one set the one with the latest
record counts, then the last name. A writer may remove the others: as all processes go by this order, that one stays.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from operator import attrgetter
from typing import Any, Literal, get_args

import pyarrow as pa

from adpa.data.cache.files import remove_file
from adpa.data.cache.locations import Location
from adpa.data.cache.ragged import list_column, list_row
from adpa.data.cache.set_records import KEY, SetRecord, read_record
from adpa.data.cache.shards import damaged, list_shards, open_shards, peek_shard, read_shard, write_shard
from adpa.data.sequences import TokenIds, TokenSequence, sequence_key
from adpa.errors import CacheError

ResponseName = Literal["chosen", "rejected", "sampled"]
RESPONSE_NAMES: tuple[ResponseName, ...] = get_args(ResponseName)

STRANGER = "its content does not match the id in its name"
SCHEMA = pa.schema(
    [
        ("example_id", pa.string()),
        ("key", pa.binary(16)),
        ("prompt_ids", pa.list_(pa.int32())),
        ("response_ids", pa.list_(pa.int32())),
    ]
)


@dataclass(frozen=True)
class Sampling:
    """How responses were sampled.

    Attributes:
        student: digest of the weights.
        turn_end: id of the end-of-turn token, which ends a response.
        temperature: 0 for greedy.
        top_p: nucleus.
        max_new_tokens: most tokens of a response.
        samples_per_prompt: responses to each prompt.
        seed: seed of all random numbers.
        dtype: dtype of the computation.
        engine: what ran the student.
        stops: further ids that end a response, ascending.
    """

    student: str
    turn_end: int
    temperature: float
    top_p: float
    max_new_tokens: int
    samples_per_prompt: int
    seed: int
    dtype: str
    engine: str
    stops: tuple[int, ...] = ()

    @property
    def ends(self) -> tuple[int, ...]:
        """All ids that end a response; the first is ``turn_end``."""
        return (self.turn_end, *self.stops)

    def describe_ends(self) -> str:
        """The ids that end a response, in words."""
        return f"ends at {' or '.join(map(str, self.ends))}"

    def settings(self) -> dict[str, Any]:
        """The fields as JSON has them: without ``stops`` where there are none, as before they existed."""
        fields = asdict(self) | {"stops": list(self.stops)}
        return {name: value for name, value in fields.items() if name != "stops" or value}


@dataclass(frozen=True)
class ResponseSetInfo:
    """How a response set was made.

    Attributes:
        name: ``chosen``, ``rejected`` or ``sampled``.
        tokenizer: digest of the tokenizer, under which ``CACHE/tokenizers`` holds it.
        vocabulary: digest of its vocabulary.
        chat_template: digest of its chat template.
        turn_end: id of the end-of-turn token.
        max_prompt_length: most tokens of a prompt.
        max_length: most tokens of a prompt and its response.
        truncated_prompts: prompts that were cut.
        truncated_responses: responses that lack their end-of-turn token.
        dropped: pairs of the data that are not in the set.
        examples: digest of the example ids; the sets of one data set have the same.
        sampling: how responses were sampled; none if they were not.
        chat_template_kwargs: arguments of the chat template for all rows.
        rendered: whether the prompts were rendered already.
    """

    name: ResponseName
    tokenizer: str
    vocabulary: str
    chat_template: str
    turn_end: int
    max_prompt_length: int
    max_length: int
    truncated_prompts: int
    dropped: int
    truncated_responses: int = 0
    examples: str = ""
    sampling: Sampling | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    rendered: bool = False

    @property
    def ends(self) -> tuple[int, ...]:
        """All ids that end a response; one without any of them was cut."""
        return (self.turn_end,) if self.sampling is None else self.sampling.ends

    @property
    def encoding(self) -> tuple[object, ...]:
        """Everything that decides how a pair of the data becomes tokens."""
        arguments = json.dumps(self.chat_template_kwargs, sort_keys=True)
        limits = (self.max_prompt_length, self.max_length)
        return (self.tokenizer, self.chat_template, arguments, self.rendered, self.turn_end, *limits)

    @property
    def rendering(self) -> list[str]:
        """How the prompts were rendered, in words; empty for the usual way."""
        arguments = self.chat_template_kwargs
        return [
            *([f"template arguments {json.dumps(arguments, sort_keys=True)}"] if arguments else []),
            *(["prompts rendered already"] if self.rendered else []),
        ]


@dataclass(frozen=True)
class ResponseSet:
    """A response set: its origin, a table with the columns of ``SCHEMA``, and the record of a run that made it."""

    info: ResponseSetInfo
    table: pa.Table
    record: SetRecord | None = None

    def __len__(self) -> int:
        return self.table.num_rows

    @cached_property
    def id(self) -> str:
        """16 hexadecimal digits: the digest of the rows and of ``info``."""
        return _digest(_canonical(self.info), self.table)

    def shard_prefix(self) -> str:
        """The beginning of the set's file name in the cache."""
        return f"{self.info.name}-{self.id}"

    def sequences(self) -> list[TokenSequence]:
        """The rows as token sequences."""
        prompts, responses = self.table["prompt_ids"], self.table["response_ids"]
        return [
            TokenSequence(key, list_row(prompts, row), list_row(responses, row))
            for row, key in enumerate(self.table["key"].to_pylist())
        ]

    @property
    def time(self) -> str:
        """The time of the record; empty without one."""
        return self.record.time if self.record else ""

    @property
    def recipe(self) -> tuple[object, ...] | None:
        """Everything that versions of one set share, made from data that changes; none without a record."""
        if self.record is None:
            return None
        return (self.info.name, *self.record.origin, self.info.encoding, self.info.sampling)

    @property
    def sampled(self) -> str:
        """How the responses were sampled, in words; empty if they were not."""
        sampling = self.info.sampling
        if sampling is None:
            return ""
        made = [f"of the student {sampling.student[:8]}", f"temperature {sampling.temperature:g}"]
        return ", ".join([*made, f"seed {sampling.seed}", *([sampling.describe_ends()] if sampling.stops else [])])

    def describe(self) -> str:
        """One line for a user who has to choose among sets."""
        return f"{self.shard_prefix()}: {self.describe_content()}"

    def describe_content(self) -> str:
        """The same without name and id."""
        return ", ".join([f"{len(self)} responses {self.sampled}".rstrip(), *self.info.rendering])


def make_response_set(
    info: ResponseSetInfo, rows: Iterable[tuple[str, TokenIds, TokenIds]], record: SetRecord | None = None
) -> ResponseSet:
    """Makes a set of (example id, prompt ids, response ids), none of them empty; rows of one example keep their order.

    This fills in the fields of ``info`` that depend on the rows: ``truncated_responses`` and ``examples``.
    """
    ordered = sorted(rows, key=lambda row: row[0])
    example_ids = [example_id for example_id, _, _ in ordered]
    prompts = [prompt for _, prompt, _ in ordered]
    responses = [response for _, _, response in ordered]
    keys = [sequence_key(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
    info = replace(
        info,
        truncated_responses=sum(int(response[-1]) not in info.ends for response in responses),
        examples=hashlib.blake2b("\n".join(sorted(set(example_ids))).encode(), digest_size=8).hexdigest(),
    )
    columns = [
        pa.array(example_ids, pa.string()),
        pa.array(keys, pa.binary(16)),
        list_column(prompts, SCHEMA.field("prompt_ids").type),
        list_column(responses, SCHEMA.field("response_ids").type),
    ]
    schema = SCHEMA.with_metadata({"adpa": _canonical(info)})
    return ResponseSet(info, pa.Table.from_arrays(columns, schema=schema), record)


def write_response_set(cache: Location, responses: ResponseSet) -> None:
    """Adds a set to a cache, with its record.

    If the cache has the set, it is written again only if its record names other data, or if a newer set has the same
    recipe: then the data has changed back, and this set is the newest again.
    """
    folder, prefix, record = cache / "responses", responses.shard_prefix(), responses.record
    present = bool(list_shards(folder, prefix))
    if record is None:
        if not present:
            write_shard(folder, prefix, responses.table)
        return
    known = [one for _, one in _readable(folder, responses.info.name, peek_response_set)]
    own = [one for one in known if one.id == responses.id]
    if present and not own:  # damaged: it is for the user to remove
        return
    versions = [one for one in known if one.recipe == responses.recipe]
    newest = max((one.time for one in versions), default="")
    if any(one.id == responses.id and one.time == newest for one in versions):
        return
    record = record.after(max([newest, *(one.time for one in own)]))
    metadata = responses.table.schema.metadata | {KEY.encode(): record.serialize().encode()}
    write_shard(folder, prefix, responses.table.replace_schema_metadata(metadata))
    for path, _ in _readable(folder, prefix, read_response_set)[:-1]:
        remove_file(path)


def _readable(
    folder: Location, prefix: str, read: Callable[[Location], ResponseSet]
) -> list[tuple[Location, ResponseSet]]:
    """The sets that can be read, those with the latest records last."""
    sets = []
    for path in list_shards(folder, prefix):
        with suppress(FileNotFoundError, CacheError):  # another process has just replaced it, or it is damaged
            sets.append((path, read(path)))
    return sorted(sets, key=lambda each: (each[1].time, each[0].name))


def read_response_sets(cache: Location) -> Iterator[ResponseSet]:
    """Reads every response set of a cache, each once: first the newest, last those without a record.

    Raises:
        CacheError: a set is of a newer format.
        DamagedFileError: the digests of a file's bytes or content differ from those in its name.
    """
    sets = [(path.name, _checked(path, table)) for path, table in open_shards(cache / "responses")]
    ordered = [responses for _, responses in sorted(sets, key=lambda each: (each[1].time, each[0]))]
    counting = {responses.id: responses for responses in ordered}
    yield from sorted(counting.values(), key=attrgetter("time"), reverse=True)


def read_response_set(path: Location) -> ResponseSet:
    """Reads the response set of a file.

    Raises:
        CacheError: it is of a newer format.
        DamagedFileError: the digests of the file's bytes or content differ from those in its name.
    """
    return _checked(path, read_shard(path))


def peek_response_set(path: Location) -> ResponseSet:
    """Opens the response set of a file without computing its digests, for counting.

    Raises:
        CacheError: it is of a newer format.
        DamagedFileError: it is not a response set.
    """
    return _interpret(path, peek_shard(path))


def _checked(path: Location, table: pa.Table) -> ResponseSet:
    responses = _interpret(path, table)
    if not path.name.startswith(f"{responses.shard_prefix()}-"):
        raise damaged(path, STRANGER)
    return responses


def _interpret(path: Location, table: pa.Table) -> ResponseSet:
    try:
        content = table.schema.metadata[b"adpa"]
        made = json.loads(content)
        sampling = made["sampling"]
        unknown = sorted([*_unknown(made, ResponseSetInfo), *_unknown(sampling or {}, Sampling)])
        newer = unknown and path.name.startswith(f"{made['name']}-{_digest(content, table)}-")
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise damaged(path, STRANGER) from error
    if newer:
        raise CacheError(f"{path}: of a newer format: it has the unknown field {unknown[0]!r}", "install a newer adpa")
    try:
        if sampling:
            sampling = Sampling(**sampling | {"stops": tuple(sampling.get("stops", ()))})
        info = ResponseSetInfo(**made | {"sampling": sampling})
    except (TypeError, AttributeError) as error:
        raise damaged(path, STRANGER) from error
    typed = isinstance(info.chat_template_kwargs, dict) and isinstance(info.rendered, bool)
    if not typed or not table.schema.equals(SCHEMA):
        raise damaged(path, STRANGER)
    return ResponseSet(info, table, read_record(table.schema.metadata))


def _unknown(described: Mapping[str, Any], known: type[ResponseSetInfo] | type[Sampling]) -> set[str]:
    return described.keys() - {field.name for field in fields(known)}


def _digest(made: bytes, table: pa.Table) -> str:
    """The id of a set: 16 hexadecimal digits of the digest of how it was made, and of its rows."""
    digest = hashlib.blake2b(made, digest_size=8)
    for column in ("example_id", "key"):
        for value in table[column].to_pylist():
            digest.update(value.encode() if isinstance(value, str) else value)
    return digest.hexdigest()


def _canonical(info: ResponseSetInfo) -> bytes:
    made = asdict(info) | {"sampling": info.sampling and info.sampling.settings()}
    for name in ("chat_template_kwargs", "rendered"):  # a set without them is written as before they existed
        if not made[name]:
            del made[name]
    return json.dumps(made, sort_keys=True).encode()
