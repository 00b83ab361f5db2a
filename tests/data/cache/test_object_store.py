"""Caches in an object store: moto's server, which speaks S3 over HTTP."""

from dataclasses import replace

import pyarrow as pa
import pytest
import s3fs
from tests.data.makers import INFO, SAMPLING, SCORING, response_rows, signal_rows, token_ids
from transformers import PreTrainedTokenizerBase
from upath import UPath

from adpa.data.cache.files import remove_file, write_file
from adpa.data.cache.format import check_cache, find_version, prepare_cache
from adpa.data.cache.locations import Location, copies_folder
from adpa.data.cache.responses import make_response_set, read_response_sets, write_response_set
from adpa.data.cache.samples import SampleRequest, missing_requests, read_samples, write_samples
from adpa.data.cache.shards import list_shards, open_shards, read_shard, read_shards, write_shard
from adpa.data.cache.signals import read_scorings, read_signals, write_scoring, write_signals
from adpa.data.cache.tokenizers import read_tokenizer, write_tokenizer
from adpa.data.vocabulary import digest_tokenizer
from adpa.errors import CacheError, DamagedFileError

TABLE = pa.table({"key": pa.array([b"a" * 16, b"b" * 16], pa.binary(16)), "ids": [[1, 2, 3], []]})
LARGE = pa.table({"ids": pa.array(range(100_000), pa.int64())})


@pytest.fixture
def cache(bucket: str) -> Location:
    return UPath(f"{bucket}/team/cache")


def objects(cache: Location) -> list[str]:
    return sorted(s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True).find(str(cache)))


@pytest.mark.parametrize("table", [TABLE, LARGE], ids=["small", "large"])
def test_a_shard_comes_back_through_a_copy_that_is_downloaded_once(table: pa.Table, cache: Location) -> None:
    path = write_shard(cache, "signals", table)
    assert [f"s3://{name}" for name in objects(cache)] == [str(path)]
    assert read_shard(path).equals(table)
    copy = copies_folder() / path.name
    before = copy.stat().st_ino
    assert read_shard(path).equals(table)
    assert copy.stat().st_ino == before


def test_a_damaged_object_is_refused_by_its_address_and_not_copied(cache: Location) -> None:
    path = write_shard(cache, "signals", TABLE)
    write_file(path, path.read_bytes()[:-1] + b"!")
    with pytest.raises(DamagedFileError) as caught:
        read_shard(path)
    assert str(caught.value).startswith(f"{cache}/{path.name}: damaged: ")
    assert list_shards(copies_folder()) == []


def test_a_damaged_copy_is_refused_by_its_path(cache: Location) -> None:
    path = write_shard(cache, "signals", TABLE)
    read_shard(path)
    copy = copies_folder() / path.name
    copy.write_bytes(b"!" + copy.read_bytes()[1:])
    with pytest.raises(DamagedFileError) as caught:
        read_shard(path)
    assert str(caught.value).startswith(f"{copy}: damaged: ")
    copy.unlink()
    assert read_shard(path).equals(TABLE)


def test_what_another_process_writes_and_removes_is_seen(cache: Location, bucket: str) -> None:
    assert list_shards(cache, "signals") == []
    other = UPath(f"{bucket}/team/cache", skip_instance_cache=True)
    path = write_shard(other, "signals", TABLE)
    assert [one.name for one in list_shards(cache, "signals")] == [path.name]
    remove_file(path)
    remove_file(path)
    assert list(read_shards(cache, "signals")) == []


def test_objects_that_another_process_packs_after_they_were_listed_are_read_packed(cache: Location) -> None:
    for start in (0, 1):
        write_shard(cache, "signals", TABLE.slice(start, 1))
    first, second = list_shards(cache, "signals")
    reading = open_shards(cache, "signals")
    assert next(reading)[0].name == first.name
    packed = write_shard(cache, "signals", TABLE)
    for path in (first, second):
        remove_file(path)
    assert [path.name for path, _ in reading] == [packed.name]


def test_everything_of_a_cache_comes_back(cache: Location, tokenizer: PreTrainedTokenizerBase) -> None:
    assert find_version(cache) is None
    with pytest.raises(CacheError, match=f"{cache}: no cache there"):
        check_cache(cache)
    responses = make_response_set(INFO, response_rows(0, "abc"))
    requests = [SampleRequest(token_ids(number), 0) for number in range(3)]
    digest = digest_tokenizer(tokenizer).tokenizer
    for _ in range(2):  # the second time changes nothing
        prepare_cache(cache)
        write_tokenizer(cache, tokenizer, digest)
        write_response_set(cache, responses)
        write_samples(cache, SAMPLING, requests[:2], [token_ids(5), token_ids(6, 7)])
        write_scoring(cache, SCORING)
        write_signals(cache, SCORING, signal_rows(responses, 0))
        written = objects(cache)
    assert check_cache(cache) == 2
    assert digest_tokenizer(read_tokenizer(cache, digest)).tokenizer == digest
    assert [one.id for one in read_response_sets(cache)] == [responses.id]
    assert [ids.tolist() for ids in read_samples(cache, SAMPLING).values()] == [[5], [6, 7]]
    assert missing_requests(read_samples(cache, SAMPLING), requests) == requests[2:]
    assert list(read_scorings(cache)) == [SCORING]
    assert (read_signals(cache, SCORING).locate(responses.table["key"]) >= 0).all()
    assert objects(cache) == written
    assert not [name for name in written if "/." in name]


def test_a_tokenizer_whose_last_file_is_missing_is_written_again(
    cache: Location, tokenizer: PreTrainedTokenizerBase
) -> None:
    """As a writer that was killed leaves it."""
    digest = digest_tokenizer(tokenizer).tokenizer
    write_tokenizer(cache, tokenizer, digest)
    whole = objects(cache)
    for name in ("files.json", "tokenizer.json"):
        remove_file(cache / "tokenizers" / digest / name)
    with pytest.raises(DamagedFileError, match="not the tokenizer that was written"):
        read_tokenizer(cache, digest)
    write_tokenizer(cache, tokenizer, digest)
    assert objects(cache) == whole
    read_tokenizer(cache, digest)


def test_a_bucket_that_is_not_there_is_one_line(bucket: str) -> None:
    nowhere = UPath("s3://no-such-bucket/cache")
    with pytest.raises(CacheError, match="no cache there"):
        check_cache(nowhere)
    with pytest.raises(CacheError) as caught:
        prepare_cache(nowhere)
    assert str(caught.value).startswith("s3://no-such-bucket/cache: cannot be written: ")
    assert "bucket does not exist" in str(caught.value)


def test_missing_credentials_are_one_line(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(CacheError) as caught:
        check_cache(UPath(f"{bucket}/cache"))
    assert str(caught.value).startswith(f"{bucket}/cache: cannot be read: ")
    assert "credentials" in str(caught.value)


def test_a_server_that_is_not_there_is_one_line(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    with pytest.raises(CacheError) as caught:
        check_cache(UPath(f"{bucket}/cache"))
    assert "cannot be read: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_sampled_set_is_told_from_the_chosen_ones(cache: Location) -> None:
    for info in (INFO, replace(INFO, name="sampled", sampling=SAMPLING)):
        write_response_set(cache, make_response_set(info, response_rows(0, "ab")))
    assert {one.info.name for one in read_response_sets(cache)} == {"chosen", "sampled"}
