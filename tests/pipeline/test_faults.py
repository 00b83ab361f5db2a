"""The state of a cache after a fault at any step of writing it, and after a plain rerun."""

import errno
import os
import re
import shutil
import subprocess
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from tests.data.makers import SAMPLING
from tests.pipeline.faults import (
    CALLS,
    DIGEST,
    REQUESTS,
    SAMPLING_BATCH,
    SCORING,
    Model,
    Point,
    Watched,
    check_wreck,
    contents,
    fill,
    fill_and_fail,
    fill_and_kill,
    points_of,
)

from adpa.data.cache.format import prepare_cache
from adpa.data.cache.shards import list_shards
from adpa.data.cache.tokenizers import read_tokenizer
from adpa.data.vocabulary import digest_tokenizer
from adpa.errors import CacheError
from adpa.pipeline.scoring.sample import sample_responses


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory in memory, if the system has one: the tests sync thousands of files."""
    with TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as temporary:
        yield Path(temporary)


@pytest.mark.parametrize("stride", [12, pytest.param(1, marks=pytest.mark.slow)])
def test_after_a_fault_at_any_step_nothing_is_lost_nothing_is_partial_and_a_rerun_completes(
    stride: int, folder: Path
) -> None:
    points = points_of(folder / "whole")
    whole = contents(folder / "whole")
    assert {point.call for point in points} == set(CALLS)
    injected: Counter[str] = Counter()
    # Both errors take the same path through the code: each kind of call raises them in turn.
    errors: dict[Point, Iterator[str]] = defaultdict(lambda: cycle(["EIO", "ENOSPC"]))
    for at, point in list(enumerate(points))[::stride]:
        # A call that fails has not done its work.
        for name in ["SIGKILL"] + [next(errors[point])] * (point.moment != "after"):
            cache = folder / f"{at}-{name}"
            committed = (
                fill_and_kill(cache, at) if name == "SIGKILL" else fill_and_fail(cache, at, getattr(errno, name))
            )
            injected[name] += 1
            removed = {line.removeprefix("unlink ") for line in committed if line.startswith("unlink ")}
            renamed = {line.removeprefix("rename ") for line in committed if line.startswith("rename ")}
            for path in renamed - removed:
                assert Path(path).exists() or f"/.{DIGEST}" in path, (point, name)
            check_wreck(cache, whole)
            fill(cache)
            assert contents(cache) == whole, (point, name)
            assert not list_shards(SCORING.folder(cache) / "pending"), (point, name)
    print(f"{sum(injected.values())} faults at {len(points)} points: {dict(injected)}")
    assert sum(injected.values()) >= 200 // stride


def test_everything_is_synced_before_it_gets_its_name_and_every_name_after(folder: Path) -> None:
    """So committed files also survive a power failure."""
    calls = " ".join(point.call for point in points_of(folder) if point.moment == "before")
    name = "rename fsync"
    assert re.fullmatch(f"((mkdir fsync|open write fsync {name}|{name}|unlink) ?)+", calls), calls


def test_two_writers_of_the_same_rows_at_the_same_time_end_in_the_same_rows(folder: Path) -> None:
    """The second writer runs from start to end before each single step of the first one."""
    points = points_of(folder / "whole")
    whole = contents(folder / "whole")
    steps = [number for number, point in enumerate(points) if point.moment == "before"]
    for step in steps:
        cache, reached = folder / str(step), iter(range(10**9))

        def reach(_: Point, cache: Path = cache, step: int = step, reached: Iterator[int] = reached) -> None:
            if next(reached) == step:
                fill(cache)

        with Watched(cache, reach, lambda _: None):
            fill(cache)
        assert contents(cache) == whole, points[step]
        assert not list(cache.rglob(".*")), points[step]


def test_a_clock_that_jumps_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(folder / "whole")
    clock = cycle([0.0, 4e9, 1e9, 2.5e9])
    monkeypatch.setattr(time, "time", lambda: next(clock))
    monkeypatch.setattr(time, "time_ns", lambda: int(next(clock) * 1e9))
    cache = folder / "cache"

    def skew(line: str) -> None:
        call, _, path = line.strip().partition(" ")
        if call == "rename":
            os.utime(path, (next(clock),) * 2)

    with Watched(cache, lambda _: None, skew):
        fill(cache)
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}
    assert contents(cache) == contents(folder / "whole")
    fill(cache)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()} == before


def test_any_file_that_vanished_is_made_again_by_a_rerun(folder: Path) -> None:
    cache = folder / "cache"
    fill(cache)
    whole = contents(cache)
    for path in sorted(path for path in cache.rglob("*") if path.is_file() and path.parent.name != DIGEST):
        path.unlink()
        fill(cache)
        assert contents(cache) == whole, path
    shutil.rmtree(cache / "tokenizers" / DIGEST)
    fill(cache)
    assert digest_tokenizer(read_tokenizer(cache, DIGEST)).tokenizer == DIGEST


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory. ``remount(disk, "size=8k")`` changes its size, or makes it read-only."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"{' '.join(command)}: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)


def test_a_full_disk_leaves_what_was_committed_and_more_room_completes_it(small_disk: Path, folder: Path) -> None:
    fill(folder / "whole")
    whole = contents(folder / "whole")
    cache = small_disk / "cache"
    sizes = [16, 20, 24, 32, 40, 48, 56, 64]
    failures = 0
    for size in sizes:
        remount(small_disk, f"size={size}k")
        try:
            fill(cache)
        except (OSError, CacheError) as error:
            failures += 1
            assert "No space left on device" in str(error)  # noqa: PT017
            check_wreck(cache, whole)
            assert not list(cache.rglob(".*"))
    assert failures >= 3
    remount(small_disk, "size=8m")
    fill(cache)
    assert contents(cache) == whole


def test_a_disk_that_becomes_read_only_leaves_what_was_committed(small_disk: Path, folder: Path) -> None:
    remount(small_disk, "size=8m")
    fill(folder / "whole")
    whole = contents(folder / "whole")
    cache = small_disk / "cache"
    prepare_cache(cache)
    sample_responses(cache, SAMPLING, REQUESTS[:2], Model, SAMPLING_BATCH)
    remount(small_disk, "ro")
    with pytest.raises(OSError, match="Read-only file system"):
        fill(cache)
    check_wreck(cache, whole)
    assert len(contents(cache)["samples"]) == 2
    remount(small_disk, "rw")
    fill(cache)
    assert contents(cache) == whole


@pytest.mark.parametrize("closed", ["responses", "scorings", "tokenizers", "samples"])
def test_a_folder_that_may_not_be_written_leaves_what_was_committed(closed: str, folder: Path) -> None:
    fill(folder / "whole")
    whole = contents(folder / "whole")
    cache = folder / "cache"
    prepare_cache(cache)
    (cache / closed).mkdir(mode=0o555)
    process = os.fork()
    if process == 0:
        code = 4
        try:
            if os.geteuid() == 0:  # file modes do not bind root
                for path in (folder, cache):
                    path.chmod(0o777)
                os.seteuid(65534)
            fill(cache)
        except PermissionError:
            code = 3
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 3
    check_wreck(cache, whole)
    (cache / closed).chmod(0o755)
    fill(cache)
    assert contents(cache) == whole
