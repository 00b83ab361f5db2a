"""Every command on a cache in an object store."""

from pathlib import Path

import pyarrow.parquet as pq
from tests.pipeline.conftest import Filled

from adpa import collect_garbage, export_cache, list_cache, merge_cache, pack_cache, verify_cache
from adpa.data.cache.files import remove_file, write_file
from adpa.data.cache.format import prepare_cache
from adpa.data.cache.locations import Location, find_location
from adpa.data.cache.responses import read_response_sets
from adpa.data.cache.shards import list_shards, read_shard, write_shard
from adpa.data.cache.signals import read_scorings, read_signals


def upload(source: Path, target: Location) -> None:
    for path in source.rglob("*"):
        if path.is_file():
            write_file(target / path.relative_to(source).as_posix(), path.read_bytes())


def test_every_command_works_on_an_object_store(filled: Filled, bucket: str, tmp_path: Path) -> None:
    cache, other = find_location(f"{bucket}/cache"), find_location(f"{bucket}/other")
    upload(filled.cache, other)
    prepare_cache(cache)
    write_file(cache / "responses" / "notes", b"")

    merged = merge_cache(cache, other)
    assert (merged.linked.files, merged.refused) == (0, [])
    local, remote = list_cache(filled.cache), list_cache(cache)
    assert (remote.sets, remote.scorings, remote.samples) == (local.sets, local.scorings, local.samples)
    assert remote.unknown == ["responses/notes"]
    assert verify_cache(cache).faults == []

    (scoring,) = read_scorings(cache)
    keys = read_signals(cache, scoring).keys()
    assert [packed.files for packed in pack_cache(cache).packed] == [1]
    assert len(list_shards(scoring.folder(cache), "signals")) == 1
    assert read_signals(cache, scoring).keys() == keys

    report = export_cache(cache, tmp_path / "rows.parquet", response_set="chosen")
    assert pq.read_metadata(tmp_path / "rows.parquet").num_rows == report.rows == 8

    (sampled,) = (path for path in list_shards(cache / "responses") if path.name.startswith("sampled"))
    remove_file(sampled)
    write_file(cache / "damaged" / "x", b"123")
    report_of_gc = collect_garbage(cache, yes=True)
    assert {garbage.kind for garbage in report_of_gc.garbage} == {"signals", "damaged"}
    assert [place.partition("/")[0] for place in report_of_gc.young] == ["samples"]
    needed = {key for one in read_response_sets(cache) for key in one.table["key"].to_pylist()}
    assert read_signals(cache, scoring).keys() == needed

    (path,) = list_shards(scoring.folder(cache), "signals")
    table = read_shard(path)
    write_file(path, path.read_bytes() + b"1")
    verified = verify_cache(cache, repair=True)
    place = f"scorings/{scoring.id}/{path.name}"
    assert ([fault.place for fault in verified.faults], verified.set_aside) == ([place], [f"damaged/{place}"])
    assert verify_cache(cache).faults == []
    write_shard(scoring.folder(cache), "signals", table)
    assert read_signals(cache, scoring).keys() == needed
