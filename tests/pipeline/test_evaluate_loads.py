"""Evaluation loads each model once, one at a time, and what the cache has is not computed again."""

import gc
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.pipeline.conftest import Filled, change_weights
from torch import Tensor

from adpa import EvaluateReport, evaluate, precompute
from adpa.data.cache.responses import ResponseSet, read_response_sets
from adpa.data.cache.samples import samples_folder
from adpa.data.cache.signals import Scoring, read_scorings
from adpa.pipeline.models.checkpoint import Checkpoint, open_checkpoint
from adpa.pipeline.scoring.engine import HfEngine
from adpa.pipeline.scoring.hf_sampler import HfSampler
from adpa.pipeline.scoring.score import Scorer


class Loads:
    """Counts the models that are loaded, and how many of them are in memory at a time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        self.most = 0
        alive: weakref.WeakSet[Any] = weakref.WeakSet()
        load = Checkpoint.load

        def counted(checkpoint: Checkpoint, *arguments: Any, **options: Any) -> Any:
            model = load(checkpoint, *arguments, **options)
            alive.add(model)
            gc.collect()
            self.names.append(checkpoint.directory.name)
            self.most = max(self.most, len(alive))
            return model

        monkeypatch.setattr(Checkpoint, "load", counted)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Loads:
    return Loads(monkeypatch)


@pytest.fixture(scope="module")
def options(few_words: Filled, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the tests evaluate: four different models of a few words."""
    models = few_words.models
    baseline = tmp_path_factory.mktemp("baseline") / "baseline"
    shutil.copytree(models.student, baseline)
    change_weights(open_checkpoint(str(baseline)), turn_around)
    return {
        "student": str(models.student),
        "baseline": str(baseline),
        "teacher": str(models.teacher),
        "reference": str(models.reference),
        "data": str(few_words.data),
        "max_new_tokens": 4,
        "samples_per_prompt": 2,
    }


def turn_around(weights: dict[str, Tensor]) -> None:
    """Another model: its head is the other way round."""
    weights["lm_head.weight"] = weights["lm_head.weight"].flip(0).contiguous()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def first(options: dict[str, Any], cache: Path) -> tuple[EvaluateReport, Loads]:
    """The first evaluation of a cache, and what it loaded."""
    with pytest.MonkeyPatch.context() as patch:
        loads = Loads(patch)
        return evaluate(**options, cache=cache), loads


def names(options: dict[str, Any], *models: str) -> list[str]:
    return [Path(options[model]).name for model in models]


def counts(report: EvaluateReport) -> tuple[int, int, int, int]:
    return report.sampled, report.answered_greedily, report.scored, report.scored_by_students


def test_each_model_is_loaded_once_and_leaves_before_the_next_one(
    first: tuple[EvaluateReport, Loads], options: dict[str, Any]
) -> None:
    report, loads = first
    assert loads.names == names(options, "student", "baseline", "teacher", "reference")
    assert loads.most == 1
    assert report.sampled == 2 * 2 * report.prompts
    assert report.answered_greedily == 2 * report.prompts
    assert report.scored > 0
    assert report.scored_by_students > 0


def test_nothing_is_loaded_again_for_what_the_cache_has(
    first: tuple[EvaluateReport, Loads], options: dict[str, Any], cache: Path, loads: Loads
) -> None:
    again = evaluate(**options, cache=cache)
    assert (loads.names, counts(again)) == ([], (0, 0, 0, 0))
    swapped = evaluate(**options | {"student": options["baseline"], "baseline": options["student"]}, cache=cache)
    assert (loads.names, counts(swapped)) == ([], (0, 0, 0, 0))
    assert swapped.student_perplexity == first[0].baseline_perplexity


@pytest.mark.slow
def test_another_student_does_not_ask_the_baseline_again(
    first: tuple[EvaluateReport, Loads], options: dict[str, Any], cache: Path, tmp_path: Path, loads: Loads
) -> None:
    copied = tmp_path / "cache"
    shutil.copytree(cache, copied)
    report = evaluate(**options | {"student": options["reference"]}, cache=copied)
    assert loads.names == names(options, "reference", "teacher", "reference")  # as the student, and as the reference
    assert report.baseline == first[0].baseline
    assert report.sampled == 2 * report.prompts


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["greedy", "scores"])
def test_a_model_that_has_only_a_part_to_do_is_loaded_once_too(
    missing: str,
    first: tuple[EvaluateReport, Loads],
    options: dict[str, Any],
    cache: Path,
    tmp_path: Path,
    loads: Loads,
) -> None:
    """A stopped run left the rest."""
    copied = tmp_path / "cache"
    shutil.copytree(cache, copied)
    if missing == "scores":
        alone = [one for one in read_scorings(copied / "evaluation") if one.reference is None]
        assert len(alone) == 2
        for scoring in alone:
            shutil.rmtree(str(scoring.folder(copied / "evaluation")))
        report = evaluate(**options, cache=copied)
        assert counts(report) == (0, 0, 0, first[0].scored_by_students)
    else:
        for one in greedy_sets(copied):
            assert one.info.sampling is not None
            shutil.rmtree(str(samples_folder(copied / "evaluation", one.info.sampling)))
        report = evaluate(**options, cache=copied)
        assert counts(report) == (0, first[0].answered_greedily, 0, 0)
    assert loads.names == names(options, "student", "baseline")
    assert report.greedy == first[0].greedy
    assert (report.student_perplexity, report.reward_margin) == (first[0].student_perplexity, first[0].reward_margin)


def greedy_sets(cache: Path) -> list[ResponseSet]:
    sets = read_response_sets(cache / "evaluation")
    return [one for one in sets if one.info.sampling is not None and one.info.sampling.temperature == 0]


@pytest.mark.slow
def test_what_the_former_version_kept_is_used_and_its_numbers_stay(
    first: tuple[EvaluateReport, Loads], options: dict[str, Any], tmp_path: Path, loads: Loads
) -> None:
    """It was a precompute of each student into the same folder."""
    students = (options["student"], options["baseline"])
    common = {name: value for name, value in options.items() if name not in ("student", "baseline")}
    for student in students:
        precompute(
            **common,
            student=student,
            cache=tmp_path / "evaluation",
            top_k=1,
            max_length=1024 + options["max_new_tokens"],
        )
    before = {one.id for one in read_response_sets(tmp_path / "evaluation")}
    loads.names.clear()
    report = evaluate(**options, cache=tmp_path)
    assert (report.sampled, report.answered_greedily) == (0, first[0].answered_greedily)
    assert 0 < report.scored < first[0].scored, "the greedy answers alone"
    assert loads.names == names(options, "student", "baseline", "teacher", "reference")
    assert replace(report, **ZEROS) == replace(first[0], **ZEROS)
    after = {one.id for one in read_response_sets(tmp_path / "evaluation")}
    assert before < after
    assert len(after - before) == 3, "rejected, and two of greedy answers"


ZEROS: dict[str, Any] = {"sampled": 0, "answered_greedily": 0, "scored": 0, "scored_by_students": 0, "seconds": 0}


def test_at_temperature_0_there_are_greedy_answers_alone(
    first: tuple[EvaluateReport, Loads], options: dict[str, Any], cache: Path, tmp_path: Path
) -> None:
    copied = tmp_path / "cache"
    shutil.copytree(cache, copied)
    report = evaluate(**options | {"temperature": 0.0, "samples_per_prompt": 1}, cache=copied)
    assert counts(report) == (0, 0, 0, 0), "they are those that stood beside the sampled ones"
    assert report.greedy is not None
    assert vars(report.greedy) == {name: getattr(report, name) for name in vars(report.greedy)}
    assert report.greedy == first[0].greedy
    assert (report.temperature, first[0].temperature) == (0, 1)


def test_at_temperature_0_new_answers_count_as_greedy_ones(options: dict[str, Any], tmp_path: Path) -> None:
    report = evaluate(**options | {"temperature": 0.0, "samples_per_prompt": 1, "limit": 3}, cache=tmp_path)
    assert (report.sampled, report.answered_greedily) == (0, 2 * report.prompts)


@pytest.mark.slow
def test_an_engine_that_scores_in_another_way_than_it_samples_starts_once_for_each(
    first: tuple[EvaluateReport, Loads],
    options: dict[str, Any],
    tmp_path: Path,
    loads: Loads,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As vLLM does. It goes by the scoring's models, so that a student gets the options of a student."""
    scored: list[tuple[str, bool]] = []
    open_scorer = HfEngine.open_scorer

    def noted(engine: HfEngine, checkpoint: Checkpoint, scoring: Scoring, longest: int) -> Scorer:
        scored.append((checkpoint.directory.name, checkpoint.identity in (scoring.teacher, scoring.reference)))
        return open_scorer(engine, checkpoint, scoring, longest)

    monkeypatch.setattr(HfSampler, "as_scorer", lambda _: None)
    monkeypatch.setattr(HfEngine, "open_scorer", noted)
    report = evaluate(**options, cache=tmp_path)
    student, baseline, teacher, reference = names(options, "student", "baseline", "teacher", "reference")
    assert loads.names == [student, student, baseline, baseline, teacher, reference]
    assert scored == [(student, False), (baseline, False), (teacher, True), (reference, True)]
    assert loads.most == 1
    assert replace(report, seconds=0) == replace(first[0], seconds=0)
