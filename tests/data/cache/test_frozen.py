"""Caches of every version of the format, as they were written at the time, are read for ever.

``frozen/<version>`` holds the signals of six pairs of the laboratory: chosen, rejected and sampled responses with a
reference and K = 4, chosen ones without a reference and K = 3; from version 2 on also with ``--top-p 0.9`` and
``--lossy``. ``frozen/signals.json`` has the numbers, as plain pyarrow read them from version 1. A version that has been
released is never changed here: a new one gets a folder of its own.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from adpa import distill, verify_cache
from adpa.data.cache.format import VERSION, check_cache
from adpa.data.cache.responses import read_response_sets
from adpa.data.cache.rounding import COARSEST
from adpa.data.cache.signal_rows import SignalRow
from adpa.data.cache.signals import Scoring, read_scorings, read_signals
from adpa.data.cache.tokenizers import read_tokenizer

FROZEN = Path(__file__).parent / "frozen"
VERSIONS = sorted(int(folder.name) for folder in FROZEN.iterdir() if folder.is_dir())
NUMBERS: dict[str, dict[str, dict[str, Any]]] = json.loads((FROZEN / "signals.json").read_text())
WITH_REFERENCE, WITHOUT_REFERENCE = "3021168e2423d2f3", "227c2b4372d065c5"
NUCLEUS, LOSSY = "90b2ed95eedfd8e5", "b8e09b2b30b62c1f"  # of chosen responses with a reference
TOP_P = 0.9
OBJECTIVES: dict[str, dict[str, Any]] = {
    WITH_REFERENCE: {"objective": "dckd"},
    WITHOUT_REFERENCE: {"objective": "kd"},
    NUCLEUS: {"objective": "adpa", "on": "chosen", "kl_weight": 1.0},
    LOSSY: {"objective": "adpa", "on": "chosen", "kl_weight": 1.0},
}
SETS = {"chosen": "a723f17867f68313", "rejected": "36e14a3367c422e3", "sampled": "fb5ec47321d4c1b8"}


@pytest.fixture(params=VERSIONS, ids=[f"version {version}" for version in VERSIONS])
def cache(request: pytest.FixtureRequest) -> Path:
    return FROZEN / str(request.param)


def scorings_of(cache: Path) -> dict[str, Scoring]:
    return {scoring.id: scoring for scoring in read_scorings(cache)}


def rows_of(cache: Path, scoring: Scoring) -> dict[str, SignalRow]:
    signals = read_signals(cache, scoring)
    return {row.key.hex(): row for row in map(signals.row, range(len(signals)))}


def assert_numbers(row: SignalRow, numbers: dict[str, Any]) -> None:
    """The same numbers, to the last bit of the types in which they are stored."""
    for name, expected in numbers.items():
        actual = getattr(row, name)
        if expected is None:
            assert actual is None
        else:
            np.testing.assert_array_equal(actual, np.array(expected, dtype=actual.dtype), err_msg=name)


def test_every_version_is_frozen() -> None:
    assert list(range(1, VERSION + 1)) == VERSIONS


def test_its_version_is_known(cache: Path) -> None:
    assert check_cache(cache) == int(cache.name)


def test_it_says_what_it_said(cache: Path) -> None:
    scorings = scorings_of(cache)
    for scoring_id, numbers in NUMBERS.items():
        rows = rows_of(cache, scorings[scoring_id])
        assert rows.keys() == numbers.keys()
        for key, row in rows.items():
            assert_numbers(row, numbers[key])


def test_its_scorings_are_those_that_were(cache: Path) -> None:
    since_2 = {NUCLEUS, LOSSY} if int(cache.name) >= 2 else set()
    assert scorings_of(cache).keys() == {WITH_REFERENCE, WITHOUT_REFERENCE} | since_2


@pytest.mark.parametrize("version", range(2, VERSION + 1))
def test_a_nucleus_has_the_fewest_ids_of_so_much_mass_and_the_rest_is_in_the_tail(version: int) -> None:
    scoring = scorings_of(FROZEN / str(version))[NUCLEUS]
    assert (scoring.top_p, scoring.lossy) == (TOP_P, False)
    rows = rows_of(FROZEN / str(version), scoring)
    assert rows.keys() == NUMBERS[WITHOUT_REFERENCE].keys(), "the chosen responses"
    fewer = 0
    for key, row in rows.items():
        numbers = NUMBERS[WITH_REFERENCE][key]
        masses = np.exp(np.array(numbers["topk_logprobs"], np.float64))
        for token, masses_K in enumerate(masses):
            count = next((n for n in range(1, 5) if masses_K[:n].sum() >= TOP_P), 4)
            fewer += count < 4
            assert (row.topk_ids[token, count:] == -1).all()
            for name in ("topk_ids", "topk_logprobs", "topk_advantages"):
                actual = getattr(row, name)[token, :count]
                np.testing.assert_array_equal(actual, np.array(numbers[name][token][:count], actual.dtype))
            tail = np.exp(numbers["tail_logprob"][token]) + masses_K[count:].sum()
            assert np.exp(float(row.tail_logprob[token])) == pytest.approx(tail, rel=5e-3, abs=1e-7)
    assert fewer > 0


@pytest.mark.parametrize("version", range(2, VERSION + 1))
def test_lossy_signals_are_near_it(version: int) -> None:
    scoring = scorings_of(FROZEN / str(version))[LOSSY]
    assert (scoring.top_p, scoring.lossy) == (1, True)
    rows = rows_of(FROZEN / str(version), scoring)
    assert rows.keys() == NUMBERS[WITHOUT_REFERENCE].keys(), "the chosen responses"
    for key, row in rows.items():
        numbers = NUMBERS[WITH_REFERENCE][key]
        np.testing.assert_array_equal(row.topk_ids, numbers["topk_ids"])
        np.testing.assert_allclose(np.exp(row.topk_logprobs), np.exp(numbers["topk_logprobs"]), atol=1e-3)
        np.testing.assert_allclose(np.asarray(row.topk_advantages), numbers["topk_advantages"], atol=COARSEST / 2)


def test_its_responses_are_those_that_were(cache: Path) -> None:
    assert {one.info.name: one.id for one in read_response_sets(cache)} == SETS


def test_nothing_is_wrong_with_it(cache: Path) -> None:
    report = verify_cache(cache)
    assert not report.failure, report


def test_a_student_trains_on_every_scoring(cache: Path, tmp_path: Path) -> None:
    tokenizer = read_tokenizer(cache, next(read_response_sets(cache)).info.tokenizer)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    model.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    for scoring in read_scorings(cache):
        report = distill(
            **OBJECTIVES[scoring.id],
            student=str(tmp_path / "student"),
            cache=cache,
            output=tmp_path / scoring.id,
            scoring=scoring.id,
            max_steps=2,
        )
        assert report.steps == 2
        assert np.isfinite(report.last_loss)
