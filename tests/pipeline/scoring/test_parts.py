"""Parts of the data: in any order, all parts together give the whole cache, and no two do the same work."""

import subprocess
import sys
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tests.data.makers import token_ids
from tests.pipeline.conftest import Filled

from adpa import precompute, verify_cache
from adpa.data.cache.format import find_version
from adpa.data.cache.responses import read_response_sets
from adpa.data.cache.signals import read_scorings, read_signals
from adpa.errors import OptionError
from adpa.pipeline.precompute import PrecomputeReport
from adpa.pipeline.scoring.parts import WHOLE, Part, PartPrompts, parse_part

PROMPTS = [token_ids(1, number) for number in range(10)]


def options(filled: Filled) -> dict[str, Any]:
    return {
        "teacher": str(filled.models.teacher),
        "reference": str(filled.models.reference),
        "student": str(filled.models.student),
        "responses": "chosen,rejected,sampled",
        "data": str(filled.data),
        "top_k": 10,
        "samples_per_prompt": 2,
        "max_new_tokens": 6,
    }


@pytest.fixture(scope="module")
def whole(few_words: Filled, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PrecomputeReport]:
    """The cache of one run, and its report."""
    cache = tmp_path_factory.mktemp("whole")
    return cache, precompute(**options(few_words), cache=cache)


def check_same(cache: Path, whole: Path) -> None:
    """Checks that response sets have the same bytes and rows agree up to rounding: padding differs between batches."""
    sets, expected = ({found.id: found for found in read_response_sets(folder)} for folder in (cache, whole))
    assert sets.keys() == expected.keys()
    assert all(sets[name].table.equals(expected[name].table) for name in sets)
    (scoring,) = read_scorings(whole)
    assert list(read_scorings(cache)) == [scoring]
    found, wanted = read_signals(cache, scoring), read_signals(whole, scoring)
    assert found.keys() == wanted.keys()
    assert len(found) == len(wanted), "two parts scored the same"
    keys = pa.array(sorted(wanted.keys()), pa.binary(16))
    for here, there in zip(found.locate(keys), wanted.locate(keys), strict=True):
        row, other = found.row(int(here)), wanted.row(int(there))
        np.testing.assert_array_equal(row.topk_ids, other.topk_ids)
        np.testing.assert_allclose(row.token_logprobs, other.token_logprobs, atol=1e-5)
    report = verify_cache(cache)
    assert (report.failure, report.unfinished) == ("", 0)


@pytest.mark.slow
@pytest.mark.parametrize("order", [*permutations((1, 2)), (3, 1, 2)])
def test_parts_done_one_after_the_other_are_the_whole(
    order: tuple[int, ...], few_words: Filled, whole: tuple[Path, PrecomputeReport], tmp_path: Path
) -> None:
    count = len(order)
    reports = [precompute(**options(few_words), cache=tmp_path, part=f"{number}/{count}") for number in order]
    check_same(tmp_path, whole[0])
    assert [report.part for report in reports] == [f"{number}/{count}" for number in order]
    assert [sum(getattr(report, name) for report in reports) for name in ("scored", "sampled", "tokens")] == [
        whole[1].scored, whole[1].sampled, whole[1].tokens,
    ]  # fmt: skip
    assert all(report.scored > 0 for report in reports)
    awaited = [report.awaited for report in reports]
    assert awaited == sorted(awaited, reverse=True)
    assert ["sampled" in report.responses for report in reports] == [number == 0 for number in awaited]
    assert reports[-1].responses == whole[1].responses


@pytest.mark.slow
def test_parts_done_at_the_same_time_are_the_whole(
    few_words: Filled, whole: tuple[Path, PrecomputeReport], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "adpa", "precompute", "--cache", str(tmp_path)]
    for name, value in options(few_words).items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    processes = [
        subprocess.Popen([*command, "--part", f"{number}/2"], stdout=subprocess.PIPE, text=True) for number in (1, 2)
    ]
    said = [process.communicate(timeout=250)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    check_same(tmp_path, whole[0])
    assert sum("No sampled set yet:" in text for text in said) < 2


def test_a_dry_run_counts_the_part_alone(few_words: Filled, tmp_path: Path) -> None:
    reports = [
        precompute(**options(few_words), cache=tmp_path / "cache", part=part, dry_run=True)
        for part in ("1/2", "2/2", None)
    ]
    first, second, everything = reports
    assert 0 < first.sampled < everything.sampled == first.sampled + second.sampled
    assert first.scored + second.scored == everything.scored
    assert (first.awaited, second.awaited, everything.awaited) == (second.sampled, first.sampled, 0)
    assert find_version(tmp_path / "cache") is None


@pytest.mark.parametrize("text", ["0/2", "3/2", "1/0", "2", "1/", "-1/2", "a/b", "1/2/3", "1 /2"])
def test_what_names_no_part_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match=f"--part {text}; expected i/n"):
        parse_part(text)


def test_a_part_is_named_by_two_numbers() -> None:
    assert parse_part("2/3") == Part(2, 3)
    assert parse_part(None) == WHOLE


@pytest.mark.parametrize("count", [1, 2, 3, 10])
def test_every_prompt_is_in_one_part_and_parts_are_even(count: int) -> None:
    parts = [PartPrompts(Part(number + 1, count), PROMPTS) for number in range(count)]
    members = [[prompt[1] for prompt in PROMPTS if prompt in part] for part in parts]
    assert sorted(number for part in members for number in part) == list(range(10))
    assert max(map(len, members)) - min(map(len, members)) <= 1


def test_a_part_depends_on_the_prompts_alone_and_not_on_their_order_or_number() -> None:
    first, again = PartPrompts(Part(1, 3), PROMPTS), PartPrompts(Part(1, 3), [*PROMPTS[::-1], *PROMPTS[:4]])
    assert [prompt in first for prompt in PROMPTS] == [prompt in again for prompt in PROMPTS]


def test_more_parts_than_prompts_are_refused() -> None:
    with pytest.raises(OptionError, match=r"--part 1/11: the data has only 10 different prompts; divide it into fewer"):
        PartPrompts(Part(1, 11), PROMPTS)
