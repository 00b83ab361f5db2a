"""The share of pairs in which teacher − reference prefers the chosen response, against dense forward passes."""

import json
import logging
import shutil
from dataclasses import asdict, replace
from html import unescape
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file
from tests.conftest import Models, Row, WriteRows
from tests.pipeline.conftest import Filled, dense_logprobs

from adpa import PrecomputeReport, inspect_cache, precompute
from adpa.data.cache.responses import read_response_sets
from adpa.data.sequences import TokenSequence
from adpa.pipeline.cache.pack import pack_cache
from adpa.pipeline.scoring.probe import ProbeReport
from adpa.pipeline.terminal.inspection import show_inspection
from adpa.pipeline.terminal.precompute import show_precompute

pytestmark = pytest.mark.slow


def pairs_of(cache: Path) -> list[tuple[TokenSequence, TokenSequence]]:
    """The chosen and the rejected response of every pair of a cache."""
    sets = {found.info.name: found for found in read_response_sets(cache)}
    assert sets["chosen"].table["example_id"].equals(sets["rejected"].table["example_id"])
    return list(zip(sets["chosen"].sequences(), sets["rejected"].sequences(), strict=True))


def reward(models: Models, sequence: TokenSequence) -> float:
    teacher, reference = (
        dense_logprobs(model, sequence)[np.arange(len(sequence.response_ids)), sequence.response_ids]
        for model in (models.teacher, models.reference)
    )
    return float((teacher.astype(np.float64) - reference).sum())


@pytest.fixture(scope="module")
def scored(few_words: Filled, tmp_path_factory: pytest.TempPathFactory) -> Filled:
    """Eight pairs, scored by a teacher and a reference; no margin is near zero."""
    models = replace(few_words.models, reference=few_words.models.student, student=few_words.models.reference)
    filled = Filled(tmp_path_factory.mktemp("scored") / "cache", few_words.data, models)
    precompute(**options(filled, filled.cache))
    return filled


@pytest.fixture(scope="module")
def margins(scored: Filled) -> dict[tuple[bytes, bytes], float]:
    """The margin of each of the eight pairs, by the keys of its responses, from one sequence at a time."""
    return {
        (chosen.key, rejected.key): reward(scored.models, chosen) - reward(scored.models, rejected)
        for chosen, rejected in pairs_of(scored.cache)
    }


def share_and_mean(margins: list[float]) -> tuple[float, Any]:
    return float(np.mean(np.array(margins) > 0)), pytest.approx(np.mean(margins), rel=1e-4)


def options(filled: Filled, cache: Path, **others: Any) -> dict[str, Any]:
    models = {"teacher": str(filled.models.teacher), "reference": str(filled.models.reference)}
    return {**models, "data": str(filled.data), "cache": cache, "top_k": 10, **others}


def shown(renderable: Any) -> str:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(renderable)
    return " ".join(capture.get().split())


def numbers(report: PrecomputeReport) -> Any:
    return report.reward_accuracy, report.reward_margin, report.reward_pairs


Margins = dict[tuple[bytes, bytes], float]


def test_the_numbers_are_those_of_the_models(scored: Filled, margins: Margins, tmp_path: Path) -> None:
    report = precompute(**options(scored, tmp_path / "cache"))
    assert report.scored == 16
    assert len(margins) == 8
    assert (report.reward_accuracy, report.reward_margin) == share_and_mean(list(margins.values()))
    assert report.reward_pairs == 8
    assert 0 < float(np.mean([margin > 0 for margin in margins.values()])) < 1, "a test of both signs"
    read = json.loads(json.dumps(asdict(report), allow_nan=False))
    assert (read["reward_accuracy"], read["reward_margin"]) == (report.reward_accuracy, report.reward_margin)


def test_the_summary_has_one_sentence_of_them(scored: Filled) -> None:
    report = precompute(**options(scored, scored.cache))
    assert report.scored == 0, "rows of earlier runs count"
    text = shown(show_precompute(report))
    sentence = (
        f"teacher − reference prefers the chosen response in {100 * (report.reward_accuracy or 0):.1f} % of 8 pairs, "
        f"mean margin {report.reward_margin:+.2f} nats."
    )
    assert text.endswith(sentence)
    assert "reward" not in text


def test_swapped_models_give_the_opposite_and_a_warning(
    scored: Filled, margins: Margins, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    accuracy, _ = share_and_mean(list(margins.values()))
    models = (str(scored.models.teacher), str(scored.models.reference))
    for (teacher, reference), expected in ((models, accuracy), (models[::-1], 1 - accuracy)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "adpa"):
            report = precompute(**options(scored, tmp_path / "cache", teacher=teacher, reference=reference))
        assert report.reward_accuracy == pytest.approx(expected)
        sign = 1 if teacher == models[0] else -1
        assert report.reward_margin == pytest.approx(sign * np.mean(list(margins.values())), rel=1e-4)
        said = [record.getMessage() for record in caplog.records]
        if expected < 0.5:
            assert len(said) == 1
            assert said[0].startswith("teacher − reference prefers the rejected response in most pairs: ")
            assert "are --teacher and --reference swapped? Or chosen and rejected in the data?" in said[0]
            assert "\n" not in said[0]
        else:
            assert said == []
    assert accuracy != 0.5, "one of the two must warn"


def test_a_few_pairs_warn_as_well(
    scored: Filled, write_rows: WriteRows, preference_rows: list[Row], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models = (str(scored.models.teacher), str(scored.models.reference))
    data = str(write_rows(preference_rows[:3]))
    for teacher, reference in (models, models[::-1]):
        given = options(scored, tmp_path / "cache", teacher=teacher, reference=reference, data=data)
        assert precompute(**given).reward_pairs == 3
    (said,) = [record.getMessage() for record in caplog.records]
    assert "% of 3 pairs" in said


def test_each_part_says_the_numbers_of_its_own_pairs(scored: Filled, margins: Margins, tmp_path: Path) -> None:
    given = options(scored, tmp_path / "cache")
    parts = [precompute(**given, part=part) for part in ("1/3", "2/3", "3/3")]
    assert sum(part.reward_pairs for part in parts) == 8
    assert len({part.reward_pairs for part in parts}) > 1
    shares = [(part.reward_accuracy or 0) * part.reward_pairs for part in parts]
    totals = [(part.reward_margin or 0) * part.reward_pairs for part in parts]
    assert (sum(shares) / 8, sum(totals) / 8) == share_and_mean(list(margins.values()))
    again = precompute(**given, part="1/3")
    assert numbers(again) == numbers(parts[0]), "the pairs of the other parts have their signals now, too"


def test_dropped_rows_do_not_count_equal_responses_neither_and_repeated_rows_do(
    scored: Filled, write_rows: WriteRows, preference_rows: list[Row], tmp_path: Path
) -> None:
    first, second, third = preference_rows[:3]
    equal = {**third, "rejected": third["chosen"]}
    empty = {**third, "chosen": ""}
    data = str(write_rows([first, second, first, equal, empty]))
    report = precompute(**options(scored, tmp_path / "cache", data=data, drop_invalid=True))
    expected = []
    for chosen, rejected in pairs_of(tmp_path / "cache"):
        if chosen.key != rejected.key:
            expected.append(reward(scored.models, chosen) - reward(scored.models, rejected))
    assert (report.dropped, report.reward_pairs, len(expected)) == (1, 3, 3)
    assert (report.reward_accuracy, report.reward_margin) == share_and_mean(expected)


@pytest.mark.parametrize("others", [{"top_p": 0.5}, {"lossy": True}, {"top_k": 1}], ids=str)
def test_what_is_kept_of_the_top_k_changes_nothing(
    others: dict[str, Any], scored: Filled, margins: Margins, tmp_path: Path
) -> None:
    report = precompute(**options(scored, tmp_path / "cache", batch_tokens=40, **others))
    accuracy, _ = share_and_mean(list(margins.values()))
    assert report.reward_accuracy == accuracy
    assert report.reward_margin == pytest.approx(np.mean(list(margins.values())), rel=1e-2)
    pack_cache(tmp_path / "cache")
    packed = precompute(**options(scored, tmp_path / "cache", batch_tokens=40, **others))
    assert numbers(packed) == (accuracy, pytest.approx(report.reward_margin), 8)


NONE = (None, None, 0)


def test_nothing_is_said_where_nothing_is_known(scored: Filled, tmp_path: Path) -> None:
    student: Any = {"student": str(scored.models.student), "max_new_tokens": 4}
    cases: list[dict[str, Any]] = [
        {"reference": None},
        {"responses": "chosen"},
        {"responses": "rejected"},
        student,
        student | {"responses": "chosen,sampled"},
        {"dry_run": True},
    ]
    for number, others in enumerate(cases):
        report = precompute(**options(scored, tmp_path / str(number), **others))
        assert numbers(report) == NONE, others
        assert "prefers" not in shown(show_precompute(report))


def test_sampled_responses_beside_them_change_nothing(scored: Filled, margins: Margins, tmp_path: Path) -> None:
    student = {"student": str(scored.models.student), "max_new_tokens": 4, "responses": "chosen,rejected,sampled"}
    report = precompute(**options(scored, tmp_path / "cache", **student))
    assert numbers(report) == (*share_and_mean(list(margins.values())), 8)


def test_a_dry_run_says_what_is_stored_already(
    scored: Filled, write_rows: WriteRows, preference_rows: list[Row], tmp_path: Path
) -> None:
    few = precompute(**options(scored, tmp_path / "cache", data=str(write_rows(preference_rows[:5]))))
    dry = precompute(**options(scored, tmp_path / "cache"), dry_run=True)
    assert dry.scored == 6
    assert numbers(dry) == numbers(few)
    assert dry.reward_pairs == 5


def probe(filled: Filled, cache: Path, count: int, **others: Any) -> tuple[PrecomputeReport, ProbeReport]:
    report = precompute(**options(filled, cache, **others), dry_run=True, probe=count)
    assert report.probe is not None
    return report, report.probe


@pytest.mark.parametrize(("count", "pairs"), [(1000, 8), (16, 8), (10, 5), (4, 2), (5, 2), (2, 1)])
def test_a_probe_of_n_responses_takes_whole_pairs(
    count: int, pairs: int, scored: Filled, margins: Margins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adpa.pipeline.scoring.probe.PROBE_TOP_K", 20)
    report, probed = probe(scored, tmp_path / "cache", count)
    assert probed.responses == min(count, 16)
    assert probed.rewards is not None
    assert numbers(report) == (probed.rewards.reward_accuracy, probed.rewards.reward_margin, pairs)
    assert numbers(report)[:2] in [share_and_mean(list(some)) for some in combinations(margins.values(), pairs)]
    assert f"{100 * probed.rewards.reward_accuracy:.1f} % of {pairs} pair" in shown(show_precompute(report))
    assert not (tmp_path / "cache").exists()


def test_a_probe_of_swapped_models_warns(
    scored: Filled, margins: Margins, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models = [str(scored.models.teacher), str(scored.models.reference)]
    if np.mean([margin > 0 for margin in margins.values()]) > 0.5:
        models.reverse()
    probe(scored, tmp_path / "cache", 64, teacher=models[0], reference=models[1])
    (record,) = caplog.records
    assert "are --teacher and --reference swapped? Or chosen and rejected in the data?" in record.getMessage()


@pytest.mark.parametrize(
    ("count", "others"), [(1, {}), (64, {"reference": None}), (64, {"responses": "chosen"}), (64, {"student": True})]
)
def test_a_probe_without_a_pair_says_nothing_of_it(
    count: int, others: dict[str, Any], scored: Filled, tmp_path: Path
) -> None:
    if "student" in others:
        others = {"student": str(scored.models.student), "max_new_tokens": 4}
    report, probed = probe(scored, tmp_path / "cache", count, **others)
    assert probed.rewards is None
    assert numbers(report) == NONE
    assert "prefers" not in shown(show_precompute(report))


def test_inspect_says_them_of_every_scoring_of_both_sets(
    scored: Filled, margins: Margins, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    models = {"teacher": str(scored.models.reference), "reference": str(scored.models.teacher)}
    done, swapped = precompute(**options(scored, cache)), precompute(**options(scored, cache, **models))
    precompute(**options(scored, cache, reference=None))
    caplog.clear()
    report = inspect_cache(cache)
    assert len(report.summaries) == 6
    assert {one.scoring for one in report.rewards} == {done.scoring, swapped.scoring}
    for one in report.rewards:
        of = done if one.scoring == done.scoring else swapped
        assert (one.reward_accuracy, one.reward_margin, one.pairs) == numbers(of)
        assert (one.chosen, one.rejected) == tuple(f"{name}-{done.responses[name]}" for name in ("chosen", "rejected"))
    text = shown(show_inspection(report))
    assert all(f"{one.of()} {one.describe()}" in text for one in report.rewards)
    low = min(report.rewards, key=lambda one: one.reward_accuracy)
    assert [record.getMessage() for record in caplog.records] == [f"{low.of()}: {low.warning()}"]
    assert share_and_mean(list(margins.values()))[0] in {one.reward_accuracy for one in report.rewards}


def test_the_page_of_one_set_has_them_and_the_warning(scored: Filled, tmp_path: Path) -> None:
    cache, file = tmp_path / "cache", tmp_path / "page.html"
    models = [str(scored.models.teacher), str(scored.models.reference)]
    for teacher, reference in (models, models[::-1]):
        done = precompute(**options(scored, cache, teacher=teacher, reference=reference))
        report = inspect_cache(cache, response_set="rejected", scoring=done.scoring, html=file)
        (one,) = report.rewards
        page = " ".join(file.read_text().split())
        told = f'<p class="warning">Warning: {one.of()}: {one.warning()}</p>'
        if one.reward_accuracy >= 0.5:
            told = f"<p>{one.of()}: {one.describe()}.</p>"
        assert told in unescape(page)
        assert page.count("mean margin") == 1


def test_inspect_says_nothing_of_sampled_responses_and_without_a_reference(
    few_words: Filled, scored: Filled, tmp_path: Path
) -> None:
    report = inspect_cache(few_words.cache, response_set="sampled")
    assert len(report.summaries) == 1
    assert report.rewards == []
    assert "prefers" not in shown(show_inspection(report))
    precompute(**options(scored, tmp_path / "cache", reference=None))
    assert inspect_cache(tmp_path / "cache").rewards == []


@pytest.mark.parametrize("order", [("chosen", "rejected"), ("rejected", "chosen"), ("chosen", "rejected,sampled")])
def test_the_second_of_two_runs_finds_the_other_responses_in_the_cache(
    order: tuple[str, str], scored: Filled, margins: Margins, tmp_path: Path
) -> None:
    student = {"student": str(scored.models.student), "max_new_tokens": 4}
    first, second = (
        precompute(**options(scored, tmp_path, responses=names, **student if "sampled" in names else {}))
        for names in order
    )
    assert numbers(first) == NONE
    assert numbers(second) == (*share_and_mean(list(margins.values())), 8)
    assert "prefers" in shown(show_precompute(second))


def test_the_second_run_looks_only_at_its_own_pairs(
    scored: Filled, margins: Margins, write_rows: WriteRows, preference_rows: list[Row], tmp_path: Path
) -> None:
    part = precompute(**options(scored, tmp_path / "cache", responses="rejected", part="1/2"))
    fewer = str(write_rows(preference_rows[:7]))
    assert numbers(precompute(**options(scored, tmp_path / "cache", responses="chosen", data=fewer))) == NONE
    whole = precompute(**options(scored, tmp_path / "cache", responses="chosen"))
    assert numbers(part) == NONE
    assert whole.reward_pairs == part.scored < 8, "the rejected responses of the other part have no signals"
    some = combinations(margins.values(), whole.reward_pairs)
    assert numbers(whole)[:2] in [share_and_mean(list(each)) for each in some]


def test_a_reference_that_differs_by_rounding_alone_is_no_reason_to_warn(
    scored: Filled, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(scored.models.teacher, tmp_path / "nearly")
    weights = load_file(tmp_path / "nearly" / "model.safetensors")
    for name in weights:
        weights[name] = weights[name] * (1 - 2**-22)
    save_file(weights, tmp_path / "nearly" / "model.safetensors", metadata={"format": "pt"})
    models = [str(scored.models.teacher), str(tmp_path / "nearly")]
    reports = [
        precompute(**options(scored, tmp_path / "cache", teacher=one, reference=other))
        for one, other in (models, models[::-1])
    ]
    assert min(report.reward_accuracy or 0 for report in reports) < 0.5
    assert all(abs(report.reward_margin or 0) < 1e-3 for report in reports)
    assert caplog.records == []
