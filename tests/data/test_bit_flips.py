"""A bit that flips anywhere in a cache is found before a wrong number is used."""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.data.makers import INFO, SAMPLING, SCORING, response_rows, signal_rows, token_ids
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from adpa.data.format import check_cache, prepare_cache
from adpa.data.responses import RESPONSE_NAMES, make_response_set, write_response_set
from adpa.data.samples import SampleRequest, read_samples, write_samples
from adpa.data.selection import Need, select
from adpa.data.signals import write_scoring, write_signals
from adpa.data.vocabulary import digest_tokenizer, read_tokenizer, write_tokenizer
from adpa.errors import CacheError

FLIPS = 1000
TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1}, "a")), unk_token="a")
DIGEST = digest_tokenizer(TOKENIZER).tokenizer
NEEDS = {name: Need(signals=True, advantages=True) for name in RESPONSE_NAMES}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of file that a cache has: four documents, a tokenizer, response sets, signals, samples."""
    cache = tmp_path_factory.mktemp("flips") / "cache"
    prepare_cache(cache)
    write_tokenizer(cache, TOKENIZER, DIGEST)
    write_scoring(cache, SCORING)
    for seed, name in enumerate(RESPONSE_NAMES):
        info = replace(INFO, name=name, tokenizer=DIGEST, sampling=SAMPLING if name == "sampled" else None)
        responses = make_response_set(info, response_rows(seed, "abc"))
        write_response_set(cache, responses)
        write_signals(cache, SCORING, signal_rows(responses, seed))
    write_samples(cache, SAMPLING, [SampleRequest(token_ids(1, 2), 0)], [token_ids(3, 4)])
    return cache


def read_as_distill_does(cache: Path) -> None:
    selection = select(cache, NEEDS, SAMPLING.student)
    read_tokenizer(cache, selection.sets["chosen"].info.tokenizer)


def read_as_precompute_does(cache: Path) -> None:
    check_cache(cache)
    read_samples(cache, SAMPLING)


# Each judge has to find every flip in the folders named beside it.
JUDGES: list[tuple[Callable[[Path], None], set[str]]] = [
    (read_as_distill_does, {"cache.json", "responses", "scorings", "tokenizers"}),
    (read_as_precompute_does, {"cache.json", "samples"}),
]


@pytest.fixture
def flips(cache: Path) -> Iterator[Callable[[random.Random], str]]:
    """Flips a random bit of a random file, after mending the one before; gives the file's path in the cache."""
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


def test_a_thousand_flipped_bits_are_each_found_by_whoever_reads_the_file(
    cache: Path, flips: Callable[[random.Random], str]
) -> None:
    generator = random.Random(0)
    found: Counter[str] = Counter()
    for _ in range(FLIPS):
        name = flips(generator)
        folder = name.partition("/")[0]
        for judge, folders in JUDGES:
            if folder in folders:
                with pytest.raises(CacheError):
                    judge(cache)
        found[folder] += 1
    print(dict(found))
    assert found.keys() == {"cache.json", "responses", "samples", "scorings", "tokenizers"}
    assert sum(found.values()) == FLIPS


def test_without_a_flip_nobody_complains(cache: Path) -> None:
    for judge, _ in JUDGES:
        judge(cache)
