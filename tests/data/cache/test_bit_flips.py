"""A flipped bit anywhere in a cache is detected before a wrong number is used."""

import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adpa import verify_cache
from adpa.data.cache.format import check_cache
from adpa.data.cache.responses import RESPONSE_NAMES, ResponseName, Sampling, read_response_sets
from adpa.data.cache.samples import read_samples
from adpa.data.cache.selection import Need, select
from adpa.data.cache.signals import read_scorings
from adpa.data.cache.tokenizers import read_tokenizer
from adpa.errors import CacheError

FLIPS = 1000
FROZEN = Path(__file__).parent / "frozen" / "2"
CHOSEN: dict[ResponseName, Need] = {"chosen": Need(signals=True, advantages=False)}
ALL = {name: Need(signals=True, advantages=True) for name in RESPONSE_NAMES}
COMPLETE = "3021168e2423d2f3"  # the scoring that has all three response sets
NEEDS = {one.id: ALL if one.id == COMPLETE else CHOSEN for one in read_scorings(FROZEN)}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of file that a cache has: documents, a tokenizer, response sets, signals, samples."""
    return Path(shutil.copytree(FROZEN, tmp_path_factory.mktemp("flips") / "cache"))


def sampling_of(cache: Path) -> Sampling:
    (sampling,) = (one.info.sampling for one in read_response_sets(cache) if one.info.sampling)
    return sampling


SAMPLING = sampling_of(FROZEN)


def read_as_distill_does(cache: Path) -> None:
    for scoring, needs in NEEDS.items():
        selection = select(cache, needs, SAMPLING.student, scoring)
        read_tokenizer(cache, selection.sets["chosen"].info.tokenizer)


def read_as_precompute_does(cache: Path) -> None:
    check_cache(cache)
    read_samples(cache, SAMPLING)


def read_as_verify_does(cache: Path) -> None:
    report = verify_cache(cache)
    if report.failure:
        raise CacheError(report.failure)


# Each judge must detect every flip in the folders beside it.
Judges = list[tuple[Callable[[Path], None], set[str]]]
READERS: Judges = [
    (read_as_distill_does, {"cache.json", "responses", "scorings", "tokenizers"}),
    (read_as_precompute_does, {"cache.json", "samples"}),
]
FOLDERS = {"cache.json", "responses", "samples", "scorings", "tokenizers"}


@pytest.fixture
def flips(cache: Path) -> Iterator[Callable[[random.Random], str]]:
    """Flips a random bit of a random file, after repairing the last one; returns the path of the file in the cache."""
    files = sorted(path for path in cache.rglob("*") if path.is_file())
    whole = {path: path.read_bytes() for path in files}
    flipped: list[Path] = []

    def mend() -> None:
        while flipped:
            path = flipped.pop()
            path.write_bytes(whole[path])

    def flip(generator: random.Random) -> str:
        mend()
        path = generator.choice(files)
        content = bytearray(whole[path])
        place = generator.randrange(8 * len(content))
        content[place // 8] ^= 1 << place % 8
        path.write_bytes(bytes(content))
        flipped.append(path)
        return path.relative_to(cache).as_posix()

    yield flip
    mend()


@pytest.mark.slow
@pytest.mark.parametrize(
    "judges",
    [
        pytest.param(READERS, id="every reader of the file"),
        pytest.param([(read_as_verify_does, FOLDERS)], id="adpa cache verify", marks=pytest.mark.slow),
    ],
)
def test_a_thousand_flipped_bits_are_each_found_by(
    judges: Judges, cache: Path, flips: Callable[[random.Random], str]
) -> None:
    generator = random.Random(0)
    detected: Counter[str] = Counter()
    for _ in range(FLIPS):
        name = flips(generator)
        folder = name.partition("/")[0]
        for judge, folders in judges:
            if folder in folders:
                with pytest.raises(CacheError):
                    judge(cache)
        detected[folder] += 1
    print(dict(detected))
    assert detected.keys() == FOLDERS
    assert sum(detected.values()) == FLIPS


def test_without_a_flip_nobody_complains(cache: Path) -> None:
    for judge in (read_as_distill_does, read_as_precompute_does, read_as_verify_does):
        judge(cache)
