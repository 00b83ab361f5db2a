import hashlib
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tests.data.makers import INFO, SAMPLING, TURN_END, ResponseRow, response_rows, token_ids

from adpa.data.cache.responses import (
    ResponseSet,
    make_response_set,
    peek_response_set,
    read_response_sets,
    write_response_set,
)
from adpa.data.cache.shards import write_shard
from adpa.data.sequences import sequence_key
from adpa.errors import CacheError, DamagedFileError

ROWS = response_rows(0, ["d", "a", "c", "b"])
SAMPLED_INFO = replace(INFO, name="sampled", sampling=SAMPLING)


def contents(responses: ResponseSet) -> list[tuple[str, bytes, list[int], list[int]]]:
    return [tuple(row.values()) for row in responses.table.to_pylist()]


def write(cache: Path, responses: ResponseSet) -> Path:
    """Writes a set to an empty cache, and returns its file."""
    write_response_set(cache, responses)
    (path,) = (cache / "responses").iterdir()
    return path


def test_a_set_has_the_columns_of_the_design() -> None:
    schema = make_response_set(INFO, ROWS).table.schema
    assert {field.name: str(field.type) for field in schema} == {
        "example_id": "string",
        "key": "fixed_size_binary[16]",
        "prompt_ids": "list<item: int32>",
        "response_ids": "list<item: int32>",
    }


def test_the_rows_of_a_set_lie_in_the_order_of_their_examples() -> None:
    expected = [
        (example_id, sequence_key(prompt, response), prompt.tolist(), response.tolist())
        for example_id, prompt, response in sorted(ROWS, key=lambda row: row[0])
    ]
    assert contents(make_response_set(INFO, ROWS)) == expected


def test_sequences_are_the_rows_as_arrays() -> None:
    responses = make_response_set(INFO, ROWS)
    for sequence, (_, key, prompt_ids, response_ids) in zip(responses.sequences(), contents(responses), strict=True):
        assert (sequence.key, sequence.prompt_ids.tolist(), sequence.response_ids.tolist()) == (
            key,
            prompt_ids,
            response_ids,
        )
        assert len(sequence) == len(prompt_ids) + len(response_ids)


def test_id_and_bytes_do_not_depend_on_the_order_of_the_rows(tmp_path: Path) -> None:
    forward, backward = make_response_set(INFO, ROWS), make_response_set(INFO, ROWS[::-1])
    assert forward.id == backward.id
    first, second = write(tmp_path / "forward", forward), write(tmp_path / "backward", backward)
    assert first.name == second.name
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    "rows",
    [
        ROWS[:-1],
        [*ROWS, ("d7edca5e23e83d8d", token_ids(1), token_ids(TURN_END))],
        [("z", *ROWS[0][1:]), *ROWS[1:]],
        [(ROWS[0][0], np.append(ROWS[0][1], np.int32(7)), ROWS[0][2]), *ROWS[1:]],
        [(ROWS[0][0], ROWS[0][1], np.insert(ROWS[0][2], 0, np.int32(7))), *ROWS[1:]],
    ],
    ids=["a row less", "a row more", "another example", "another prompt", "another response"],
)
def test_the_id_depends_on_the_rows(rows: list[ResponseRow]) -> None:
    assert make_response_set(INFO, rows).id != make_response_set(INFO, ROWS).id


def changed(value: Any) -> Any:
    return value + 1 if isinstance(value, int | float) else f"other {value}"


@pytest.mark.parametrize(
    "name",
    [field.name for field in fields(INFO) if field.name not in ("sampling", "examples", "truncated_responses")],
)
def test_the_id_depends_on_how_the_set_was_made(name: str) -> None:
    other = replace(INFO, **{name: changed(getattr(INFO, name))})
    if name != "turn_end":
        assert make_response_set(other, ROWS).info == replace(
            make_response_set(INFO, ROWS).info, **{name: changed(getattr(INFO, name))}
        )
    assert make_response_set(other, ROWS).id != make_response_set(INFO, ROWS).id


@pytest.mark.parametrize("name", [field.name for field in fields(SAMPLING)])
def test_the_id_depends_on_how_the_responses_were_sampled(name: str) -> None:
    other = replace(SAMPLED_INFO, sampling=replace(SAMPLING, **{name: changed(getattr(SAMPLING, name))}))
    assert make_response_set(other, ROWS).id != make_response_set(SAMPLED_INFO, ROWS).id


def test_responses_without_their_end_of_turn_are_counted() -> None:
    endings = [[5, TURN_END], [5], [TURN_END], [TURN_END, 5], [TURN_END, 5, TURN_END]]
    rows = [(f"{number}", token_ids(1), token_ids(*ending)) for number, ending in enumerate(endings)]
    assert make_response_set(INFO, rows).info.truncated_responses == 2


def test_several_responses_to_one_prompt_keep_their_order() -> None:
    prompt = token_ids(1)
    rows = [(example_id, prompt, token_ids(number, TURN_END)) for number in (30, 10, 20) for example_id in "ba"]
    responses = [(row[0], row[3][0]) for row in contents(make_response_set(SAMPLED_INFO, rows))]
    assert responses == [("a", 30), ("a", 10), ("a", 20), ("b", 30), ("b", 10), ("b", 20)]


def test_sets_of_one_data_set_know_it() -> None:
    """Whatever the responses and their number: the examples are the same."""
    again = response_rows(1, ["a", "a", "b", "b", "c", "c", "d", "d"])
    less = response_rows(2, ["a", "b", "c"])
    examples = make_response_set(INFO, ROWS).info.examples
    assert make_response_set(SAMPLED_INFO, again).info.examples == examples
    assert make_response_set(INFO, less).info.examples != examples


@pytest.mark.parametrize("info", [INFO, SAMPLED_INFO], ids=["chosen", "sampled"])
def test_a_set_comes_back_from_the_cache(info: Any, tmp_path: Path) -> None:
    responses = make_response_set(info, ROWS)
    write_response_set(tmp_path, responses)
    (read,) = read_response_sets(tmp_path)
    assert read.info == responses.info
    assert read.table.equals(responses.table, check_metadata=True)
    assert read.id == responses.id
    assert len(read) == len(ROWS)


def test_a_set_describes_itself_in_plain_arrow_metadata(tmp_path: Path) -> None:
    path = write(tmp_path, make_response_set(SAMPLED_INFO, ROWS))
    made = json.loads(pa.ipc.open_file(path).schema.metadata[b"adpa"])
    assert (made["name"], made["max_length"], made["sampling"]["seed"]) == ("sampled", 32, 0)


def test_several_sets_lie_side_by_side_and_one_is_written_once(tmp_path: Path) -> None:
    sets = [make_response_set(info, ROWS) for info in (INFO, SAMPLED_INFO, INFO)]
    for responses in sets:
        write_response_set(tmp_path, responses)
    assert {read.id for read in read_response_sets(tmp_path)} == {sets[0].id, sets[1].id}
    assert len(list((tmp_path / "responses").iterdir())) == 2


def test_a_cache_without_sets_has_none(tmp_path: Path) -> None:
    assert list(read_response_sets(tmp_path)) == []


def test_a_flipped_bit_anywhere_in_the_file_is_found(tmp_path: Path) -> None:
    """Arrow trusts its offsets: reading damaged ones would crash the process instead of raising."""
    path = write(tmp_path, make_response_set(INFO, ROWS))
    whole = path.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        with pytest.raises(DamagedFileError):
            list(read_response_sets(tmp_path))


@pytest.mark.parametrize("content", [b"", b"garbage", None], ids=["empty", "garbage", "cut off"])
def test_a_file_that_is_no_set_is_refused_by_name(content: bytes | None, tmp_path: Path) -> None:
    path = write(tmp_path, make_response_set(INFO, ROWS))
    path.write_bytes(path.read_bytes()[:200] if content is None else content)
    with pytest.raises(DamagedFileError) as caught:
        list(read_response_sets(tmp_path))
    assert str(caught.value).startswith(f"{path}: damaged: ")


def forge(responses: ResponseSet, forgery: str) -> pa.Table:
    """Whole files that another program could write under the name of the set."""
    table = responses.table
    made = json.loads(table.schema.metadata[b"adpa"])
    if forgery == "a changed example":
        ids = ["0", *table["example_id"].to_pylist()[1:]]
        return table.set_column(0, table.schema.field("example_id"), pa.array(ids))
    if forgery == "a row less":
        return table.slice(1)
    if forgery == "a column less":
        return table.drop_columns("prompt_ids")
    metadata = {
        "a changed limit": json.dumps(made | {"max_length": 64}),
        "an unknown field": json.dumps(made | {"max_words": 64}),
        "a missing field": json.dumps({"name": "chosen"}),
        "metadata that is no object": "7",
        "metadata that is no JSON": "{",
        "no metadata": None,
    }[forgery]
    return table.replace_schema_metadata(None if metadata is None else {"adpa": metadata})


@pytest.mark.parametrize(
    "forgery",
    [
        "a changed example",
        "a row less",
        "a column less",
        "a changed limit",
        "an unknown field",
        "a missing field",
        "metadata that is no object",
        "metadata that is no JSON",
        "no metadata",
    ],
)
def test_a_whole_file_with_another_content_is_refused_by_name(forgery: str, tmp_path: Path) -> None:
    responses = make_response_set(INFO, ROWS)
    path = write_shard(tmp_path / "responses", f"chosen-{responses.id}", forge(responses, forgery))
    with pytest.raises(DamagedFileError) as caught:
        list(read_response_sets(tmp_path))
    assert str(caught.value).startswith(f"{path}: damaged: ")


def test_a_set_under_the_name_of_another_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, make_response_set(INFO, ROWS))
    path.rename(path.with_name(path.name.replace("chosen", "rejected")))
    with pytest.raises(DamagedFileError):
        list(read_response_sets(tmp_path))


def test_a_set_is_described_by_what_tells_it_from_others() -> None:
    chosen, sampled = make_response_set(INFO, ROWS), make_response_set(SAMPLED_INFO, ROWS)
    assert chosen.describe() == f"chosen-{chosen.id}: 4 responses"
    assert sampled.describe() == f"sampled-{sampled.id}: 4 responses of the student student-, temperature 0.7, seed 0"


NEWER: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "template arguments": (
        {"chat_template_kwargs": {"enable_thinking": False, "date": "1 May"}},
        {},
        "d7edca5e23e83d8d",
        'template arguments {"date": "1 May", "enable_thinking": false}',
    ),
    "rendered": ({"rendered": True}, {}, "0ce83bdfa2cace17", "prompts rendered already"),
    "stops": ({}, {"stops": (7, 9)}, "e560f11983b914fe", "ends at 2 or 7 or 9"),
}


@pytest.mark.parametrize("kind", NEWER)
def test_a_set_with_a_newer_field_has_an_id_of_its_own_and_comes_back(kind: str, tmp_path: Path) -> None:
    """The literal ids are a promise: a later version must compute the same."""
    changes, sampling, literal, described = NEWER[kind]
    responses = make_response_set(replace(SAMPLED_INFO, **changes, sampling=replace(SAMPLING, **sampling)), ROWS)
    assert responses.id == literal
    path = write(tmp_path, responses)
    (read,) = read_response_sets(tmp_path)
    assert (read.info, read.id) == (responses.info, literal)
    assert peek_response_set(path).info == responses.info
    metadata = pa.ipc.open_file(path).schema.metadata[b"adpa"]
    assert id_of(metadata, responses.table) == literal
    made = json.loads(metadata)
    assert set(changes) == made.keys() & {"chat_template_kwargs", "rendered"}
    assert set(sampling) == made["sampling"].keys() & {"stops"}
    usual = make_response_set(SAMPLED_INFO, ROWS)
    assert responses.describe() == f"{usual.describe().replace(usual.id, literal)}, {described}"


def test_a_set_that_ends_at_several_ids_counts_none_of_them_as_cut() -> None:
    endings = [[5, TURN_END], [5, 7], [5, 9], [5, 8]]
    rows = [(f"{number}", token_ids(1), token_ids(*ending)) for number, ending in enumerate(endings)]
    several = replace(SAMPLED_INFO, sampling=replace(SAMPLING, stops=(7, 9)))
    assert make_response_set(several, rows).info.truncated_responses == 1
    assert make_response_set(SAMPLED_INFO, rows).info.truncated_responses == 3


def id_of(made: bytes, table: pa.Table) -> str:
    """The id as docs/format.md defines it."""
    values = [*table["example_id"].to_pylist(), *table["key"].to_pylist()]
    rows = b"".join(value.encode() if isinstance(value, str) else value for value in values)
    return hashlib.blake2b(made + rows, digest_size=8).hexdigest()


def from_the_future(responses: ResponseSet, change: str) -> tuple[pa.Table, bytes]:
    """The table that a newer program might write, and how it says the set was made."""
    table = responses.table
    made = json.loads(table.schema.metadata[b"adpa"])
    if change == "of the set":
        made["images"] = ["digest"]
    elif change == "of its sampling":
        made["sampling"]["min_p"] = 0.1
    metadata = json.dumps(made, sort_keys=True).encode()
    return table.replace_schema_metadata({"adpa": metadata}), metadata


@pytest.mark.parametrize(("change", "field"), [("of the set", "images"), ("of its sampling", "min_p")])
def test_a_set_of_a_newer_format_is_refused_as_such_and_is_not_damaged(change: str, field: str, tmp_path: Path) -> None:
    responses = make_response_set(SAMPLED_INFO, ROWS)
    table, metadata = from_the_future(responses, change)
    set_id = id_of(metadata, table)
    path = Path(str(write_shard(tmp_path / "responses", f"sampled-{set_id}", table)))
    for read in (lambda: list(read_response_sets(tmp_path)), lambda: peek_response_set(path)):
        with pytest.raises(CacheError) as caught:
            read()
        assert not isinstance(caught.value, DamagedFileError)
        assert str(caught.value) == (
            f"{path}: of a newer format: it has the unknown field {field!r}; install a newer adpa"
        )
    stranger = path.rename(path.with_name(path.name.replace(set_id, "0" * 16)))
    with pytest.raises(DamagedFileError, match="its content does not match the id in its name"):
        peek_response_set(stranger)


@pytest.mark.parametrize("change", [{"chat_template_kwargs": 7}, {"rendered": "yes"}, {"chat_template_kwargs": {}}])
def test_a_newer_field_with_a_wrong_value_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    table = make_response_set(INFO, ROWS).table
    made = json.dumps(json.loads(table.schema.metadata[b"adpa"]) | change, sort_keys=True).encode()
    forged = table.replace_schema_metadata({"adpa": made})
    write_shard(tmp_path / "responses", f"chosen-{id_of(made, forged)}", forged)
    with pytest.raises(DamagedFileError, match="its content does not match"):
        list(read_response_sets(tmp_path))


def test_metadata_of_any_depth_is_refused_in_one_line(tmp_path: Path) -> None:
    responses = make_response_set(INFO, ROWS)
    deep = responses.table.replace_schema_metadata({"adpa": '{"name": ' + "[" * 100_000})
    write_shard(tmp_path / "responses", f"chosen-{responses.id}", deep)
    with pytest.raises(DamagedFileError, match="its content does not match"):
        list(read_response_sets(tmp_path))
