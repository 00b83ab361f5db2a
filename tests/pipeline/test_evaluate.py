"""Evaluation of real models: its numbers against transformers in float64, what it keeps, what it refuses."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.conftest import MakeModel, Models, Row, WriteRows, swap_two_tokens
from tests.pipeline.conftest import change_weights
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from adpa import EvaluateReport, evaluate
from adpa.data.bootstrap import bootstrap_interval, win_share
from adpa.data.cache.responses import ResponseSet, read_response_sets
from adpa.data.sequences import TokenSequence
from adpa.errors import AdpaError
from adpa.pipeline.models.checkpoint import open_checkpoint
from adpa.pipeline.scoring import hf_sampler as sampler_hf

SAMPLES = 2


@pytest.fixture(scope="module")
def students(make_model: MakeModel, models: Models) -> Models:
    """The student ends about a third of its turns at any token; the baseline hardly ever ends one."""
    ending = open_checkpoint(str(make_model(50, layers=1, tie_word_embeddings=False)))
    turn_end = ending.tokenizer.convert_tokens_to_ids("<|im_end|>")

    def end_often(weights: dict[str, Tensor]) -> None:
        weights["lm_head.weight"][turn_end] *= 10

    change_weights(ending, end_often)
    return replace(models, student=ending.directory)


@pytest.fixture(scope="module")
def options(students: Models, preference_rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the tests evaluate: eight prompts, one of them twice, and a row without one."""
    data = tmp_path_factory.mktemp("heldout") / "heldout.jsonl"
    rows = [*preference_rows[:8], {**preference_rows[3], "chosen": preference_rows[4]["chosen"]}, {"chosen": "Yes."}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "student": str(students.student),
        "baseline": str(students.other_student),
        "teacher": str(students.teacher),
        "reference": str(students.reference),
        "data": str(data),
        "samples_per_prompt": SAMPLES,
        "max_new_tokens": 7,
        "drop_invalid": True,
    }


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def report(options: dict[str, Any], cache: Path) -> EvaluateReport:
    return evaluate(**options, cache=cache)


def answers(cache: Path, student: str, greedy: bool = False) -> list[TokenSequence]:
    """What a model said, one prompt after the other and each prompt once."""

    def is_its_own(found: ResponseSet) -> bool:
        sampling = found.info.sampling
        if sampling is None or (sampling.temperature == 0) != greedy:
            return False
        return sampling.student == open_checkpoint(student).identity.digest

    (sampled,) = filter(is_its_own, read_response_sets(cache / "evaluation"))
    by_prompt: dict[bytes, list[TokenSequence]] = {}
    for sequence in sampled.sequences():
        by_prompt.setdefault(sequence.prompt_ids.tobytes(), []).append(sequence)
    return [sequence for said in by_prompt.values() for sequence in said[: 1 if greedy else SAMPLES]]


def numbers(report: EvaluateReport) -> EvaluateReport:
    """The report without what depends on the work that was there already."""
    return replace(report, sampled=0, answered_greedily=0, scored=0, scored_by_students=0, seconds=0)


def log_probability(model: Any, sequence: TokenSequence) -> float:
    """Of the response given the prompt, in float64."""
    whole = torch.from_numpy(np.concatenate([sequence.prompt_ids, sequence.response_ids])).long()
    with torch.inference_mode():
        logprobs = model(input_ids=whole[None]).logits[0].log_softmax(-1)
    start = len(sequence.prompt_ids)
    return sum(float(logprobs[place - 1, whole[place]]) for place in range(start, len(whole)))


def test_the_numbers_are_those_of_transformers_in_float64(
    report: EvaluateReport, options: dict[str, Any], cache: Path
) -> None:
    judges = {
        name: AutoModelForCausalLM.from_pretrained(options[name], dtype=torch.float64).eval()
        for name in ("teacher", "reference")
    }
    rewards: dict[str, NDArray[np.float64]] = {}
    lengths: dict[str, NDArray[np.float64]] = {}
    for name in ("student", "baseline"):
        said = answers(cache, options[name])
        summary = getattr(report, name)
        reward = np.array(
            [log_probability(judges["teacher"], s) - log_probability(judges["reference"], s) for s in said]
        )
        length = np.array([len(s.response_ids) for s in said], dtype=float)
        assert summary.implicit_reward == pytest.approx(reward.mean(), abs=1e-5)
        assert summary.implicit_reward_per_token == pytest.approx((reward / length).mean(), abs=1e-5)
        assert summary.tokens == length.mean()
        turn_end = open_checkpoint(options["teacher"]).tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert summary.ended == np.mean([turn_end in s.response_ids for s in said])
        rewards[name], lengths[name] = reward.reshape(-1, SAMPLES), length.reshape(-1, SAMPLES)
    assert report.prompts == len(rewards["student"]) == 8
    for ending, mine, theirs in (
        ("", rewards["student"], rewards["baseline"]),
        ("_per_token", rewards["student"] / lengths["student"], rewards["baseline"] / lengths["baseline"]),
    ):
        difference = bootstrap_interval([(mine - theirs).mean(axis=1)])
        wins = bootstrap_interval([((mine > theirs) + 0.5 * (mine == theirs)).mean(axis=1)])
        assert asdict(getattr(report, f"difference{ending}")) == pytest.approx(asdict(difference), abs=1e-5)
        assert asdict(getattr(report, f"win_rate{ending}")) == pytest.approx(asdict(wins), abs=1e-12)
        assert difference.low < difference.mean < difference.high


def reward_of(sequence: TokenSequence, judges: list[Any]) -> float:
    """The implicit reward by teacher and reference."""
    teacher, reference = (log_probability(judge, sequence) for judge in judges)
    return teacher - reference


def in_float64(directory: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).eval()


def test_greedy_answers_are_those_of_transformers_and_have_numbers_of_their_own(
    report: EvaluateReport, options: dict[str, Any], cache: Path
) -> None:
    assert report.greedy is not None
    turn_end = open_checkpoint(options["teacher"]).tokenizer.convert_tokens_to_ids("<|im_end|>")
    judges = [in_float64(options[name]) for name in ("teacher", "reference")]
    rewards = {}
    for name in ("student", "baseline"):
        said, model = answers(cache, options[name], greedy=True), in_float64(options[name])
        assert len(said) == 8, "one to each prompt"
        for sequence in said:
            ids = torch.from_numpy(sequence.prompt_ids.copy()).long()[None]
            settings = GenerationConfig(do_sample=False, max_new_tokens=7, eos_token_id=turn_end, pad_token_id=turn_end)
            continued = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
            assert continued[0, ids.shape[1] :].tolist() == sequence.response_ids.tolist()
        rewards[name] = np.array([reward_of(one, judges) for one in said])
        summary = getattr(report.greedy, name)
        assert summary.implicit_reward == pytest.approx(rewards[name].mean(), abs=1e-5)
        assert summary.tokens == np.mean([len(one.response_ids) for one in said])
    difference = bootstrap_interval([rewards["student"] - rewards["baseline"]])
    assert asdict(report.greedy.difference) == pytest.approx(asdict(difference), abs=1e-4)
    wins = bootstrap_interval([win_share(rewards["student"], rewards["baseline"])])
    assert asdict(report.greedy.win_rate) == pytest.approx(asdict(wins), abs=1e-12)
    assert report.greedy.win_rate != report.win_rate


def test_perplexity_and_the_students_own_reward_are_those_of_transformers_in_float64(
    report: EvaluateReport, options: dict[str, Any], cache: Path
) -> None:
    sets = {one.info.name: one.sequences() for one in read_response_sets(cache / "evaluation")}
    chosen, rejected = sets["chosen"], sets["rejected"]
    assert len(chosen) == len(rejected) == 9, "pairs with the same prompt count, each"
    logprobs = {}
    for name in ("student", "baseline"):
        model = in_float64(options[name])
        by_set = [[log_probability(model, one) for one in responses] for responses in (chosen, rejected)]
        logprobs[name] = np.array(by_set).T
        tokens = sum(len(one.response_ids) for one in chosen)
        perplexity = np.exp(-logprobs[name][:, 0].sum() / tokens)
        assert getattr(report, f"{name}_perplexity") == pytest.approx(perplexity, rel=1e-5)
    margins = np.subtract(*(logprobs["student"] - logprobs["baseline"]).T)
    assert report.reward_pairs == 9
    assert report.reward_accuracy == np.mean(margins > 0)
    assert report.reward_margin == pytest.approx(margins.mean(), abs=1e-4)
    assert report.truncated_responses == 0


def test_the_answers_to_the_first_prompts_are_shown(
    options: dict[str, Any], cache: Path, report: EvaluateReport, preference_rows: list[Row]
) -> None:
    shown = evaluate(**options, cache=cache, show=3).shown
    assert [one.prompt for one in shown] == [last_question(row) for row in preference_rows[:3]]
    tokenizer = open_checkpoint(options["teacher"]).tokenizer
    judges = [in_float64(options[name]) for name in ("teacher", "reference")]
    for name in ("student", "baseline"):
        said = {tokenizer.decode(one.prompt_ids): one for one in reversed(answers(cache, options[name]))}
        for one in shown:
            (prompt,) = [text for text in said if f"user\n{one.prompt}<|im_end|>\n<|im_start|>assistant" in text]
            assert getattr(one, name) == str(tokenizer.decode(said[prompt].response_ids)).removesuffix("<|im_end|>")
            assert getattr(one, f"{name}_reward") == pytest.approx(reward_of(said[prompt], judges), abs=1e-4)
    assert report.shown == []
    assert len(evaluate(**options, cache=cache, show=100).shown) == 8, "each prompt once"


def last_question(row: Row) -> str:
    prompt = row["prompt"] if "prompt" in row else row["chosen"][:-1]
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def test_prompts_alone_have_answers_but_neither_perplexity_nor_reward_accuracy(
    options: dict[str, Any], cache: Path, report: EvaluateReport, preference_rows: list[Row], write_rows: WriteRows
) -> None:
    rows = [{"prompt": row["prompt"] if "prompt" in row else row["chosen"][:-1]} for row in preference_rows[:8]]
    alone = evaluate(**options | {"data": str(write_rows(rows, "prompts.jsonl"))}, cache=cache, show=1)
    assert (alone.student_perplexity, alone.baseline_perplexity) == (None, None)
    assert (alone.reward_accuracy, alone.reward_margin, alone.reward_pairs) == (None, None, 0)
    assert (alone.sampled, alone.answered_greedily, alone.scored, alone.scored_by_students) == (0, 0, 0, 0)
    assert alone.student.implicit_reward == pytest.approx(report.student.implicit_reward)
    assert alone.shown[0].prompt == last_question(preference_rows[0])


def test_some_responses_end_by_themselves_and_the_others_are_cut(report: EvaluateReport) -> None:
    assert 0 < report.student.ended < 1
    assert report.student.tokens < report.baseline.tokens <= 7


def test_a_prompt_that_is_there_twice_counts_once_and_a_row_that_cannot_be_used_is_counted(
    report: EvaluateReport,
) -> None:
    assert (report.prompts, report.repeated_prompts, report.dropped) == (8, 1, 1)
    assert report.sampled == 2 * SAMPLES * 8
    assert report.answered_greedily == 2 * 8
    assert report.scored_by_students == 2 * (8 + 9), "each chosen and rejected response once"


def test_the_report_says_that_adpa_trains_on_this_reward(report: EvaluateReport) -> None:
    assert "is also what ADPA trains on" in report.note
    assert "no proof of better answers" in report.note


def test_the_two_models_may_change_places_and_nothing_is_sampled_again(
    report: EvaluateReport, options: dict[str, Any], cache: Path
) -> None:
    turned = evaluate(**options | {"student": options["baseline"], "baseline": options["student"]}, cache=cache)
    assert (turned.sampled, turned.answered_greedily, turned.scored, turned.scored_by_students) == (0, 0, 0, 0)
    assert (turned.student, turned.baseline) == (report.baseline, report.student)
    assert turned.win_rate.mean == pytest.approx(1 - report.win_rate.mean)
    assert turned.difference.low == pytest.approx(-report.difference.high)


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_where_it_was(
    report: EvaluateReport, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = sampler_hf.sample
    baseline = str(open_checkpoint(options["baseline"]).directory)

    def stopped(model: Any, *arguments: Any) -> Any:
        if model.name_or_path == baseline:
            raise KeyboardInterrupt
        return sample(model, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(sampler_hf, "sample", stopped)
        with pytest.raises(KeyboardInterrupt):
            evaluate(**options, cache=tmp_path)
    resumed = evaluate(**options, cache=tmp_path)
    assert resumed.sampled == report.sampled // 2
    assert numbers(resumed) == numbers(report)


def test_what_an_evaluation_keeps_lies_apart_from_what_training_reads(report: EvaluateReport, cache: Path) -> None:
    assert [path.name for path in cache.iterdir()] == ["evaluation"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: {"baseline": o["student"]}, "it has the weights of --student .* nothing to compare"),
        (lambda o: {"reference": o["teacher"]}, r"--reference .*: it has the teacher's weights"),
        (lambda _: {"baseline": "./nowhere"}, r"\./nowhere: no such directory"),
        (lambda _: {"data": "./nowhere.jsonl"}, r"nowhere\.jsonl: no such file"),
        (lambda _: {"student": "./nowhere", "data": "./nowhere.jsonl"}, r"\./nowhere: no such directory"),
        (lambda _: {"drop_invalid": False}, "line 10"),
        (lambda _: {"show": -1}, "--show -1; expected at least 0"),
        (lambda _: {"show": 1.5}, "--show 1.5; expected a whole number"),
        (lambda _: {"samples_per_prompt": 0}, "--samples-per-prompt 0; expected at least 1"),
        (lambda _: {"max_new_tokens": 0}, "--max-new-tokens 0; expected at least 1"),
        (lambda _: {"max_prompt_length": 0}, "--max-prompt-length 0"),
        (lambda _: {"max_new_tokens": 2048}, "positions"),
        (lambda _: {"tensor_parallel": 2, "device": "cpu"}, "--tensor-parallel is for vLLM"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_anything_is_written(
    change: Callable[[dict[str, Any]], dict[str, Any]], message: str, options: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(AdpaError, match=message):
        evaluate(**options | change(options), cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_baseline_of_another_vocabulary_is_refused_before_the_student_is_asked(
    make_model: MakeModel, options: dict[str, Any], tmp_path: Path
) -> None:
    other = make_model(51)
    swap_two_tokens(other)
    with pytest.raises(AdpaError, match="different vocabularies"):
        evaluate(**options | {"baseline": str(other)}, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_one_prompt_is_too_few_for_an_interval(
    options: dict[str, Any], preference_rows: list[Row], write_rows: WriteRows, tmp_path: Path
) -> None:
    one = write_rows(preference_rows[:1] * 2, "heldout.jsonl")
    with pytest.raises(AdpaError, match="all its prompts are one and the same; give at least two"):
        evaluate(**options | {"data": str(one)}, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists(), "it is known before anything is sampled"


def test_data_without_a_prompt_is_refused(options: dict[str, Any], write_rows: WriteRows, tmp_path: Path) -> None:
    with pytest.raises(AdpaError, match=r"heldout\.jsonl"):
        evaluate(**options | {"data": str(write_rows([], "heldout.jsonl"))}, cache=tmp_path / "cache")


@pytest.mark.slow
def test_a_real_model_is_less_surprised_by_real_answers_than_the_same_model_with_noise(
    smollm2: Path, preference_rows: list[Row], write_rows: WriteRows, tmp_path: Path
) -> None:
    """SmolLM2-135M, and perplexity as transformers' own loss gives it."""
    noisy = shutil.copytree(smollm2, tmp_path / "noisy")

    def add_noise(weights: dict[str, Tensor]) -> None:
        generator = torch.Generator().manual_seed(0)
        for name in [name for name in weights if name.endswith("down_proj.weight")]:
            noise = torch.randn(weights[name].shape, generator=generator) * weights[name].float().std()
            weights[name] = (weights[name].float() + noise / 2).to(weights[name].dtype)

    change_weights(open_checkpoint(str(noisy)), add_noise)
    data = write_rows(preference_rows[:3], "heldout.jsonl")
    options: dict[str, Any] = {"data": str(data), "max_new_tokens": 6, "dtype": "float32", "cache": tmp_path / "cache"}
    report = evaluate(str(smollm2), str(noisy), teacher=str(smollm2), reference=str(noisy), show=1, **options)
    chosen = next(one for one in read_response_sets(tmp_path / "cache" / "evaluation") if one.info.name == "chosen")
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    losses, tokens = [], 0
    for one in chosen.sequences():
        ids = torch.from_numpy(np.concatenate([one.prompt_ids, one.response_ids])).long()[None]
        labels = ids.clone()
        labels[0, : len(one.prompt_ids)] = -100
        with torch.inference_mode():
            losses.append(float(model(input_ids=ids, labels=labels).loss) * len(one.response_ids))
        tokens += len(one.response_ids)
    assert report.student_perplexity == pytest.approx(np.exp(sum(losses) / tokens), rel=1e-4)
    assert report.student_perplexity is not None
    assert report.baseline_perplexity is not None
    assert report.baseline_perplexity > 2 * report.student_perplexity
    assert report.greedy is not None
    assert report.greedy.student.implicit_reward > 0, "teacher and reference are the two models themselves"
    assert report.greedy.win_rate.mean == 1
    assert report.shown[0].prompt == last_question(preference_rows[0])
