"""Compares two trained models on held-out prompts by the implicit reward of a teacher and its reference.

The implicit reward of a response y to a prompt x is Σ_t log π_teacher(y_t) − log π_reference(y_t), the reward that DPO
gave the teacher, divided by its β (Rafailov et al., Direct Preference Optimization, 2023, equation 5, without the
constant of the prompt). It needs no judge and no reward that somebody programmed, but ADPA trains on it.

Shapes: P distinct prompts, M responses to each, T tokens of a response.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Doc

from adpa.data.bootstrap import Interval, bootstrap_interval, win_share
from adpa.data.cache.format import check_new_cache
from adpa.data.cache.locations import Location, check_writable
from adpa.data.cache.responses import read_response_sets
from adpa.data.cache.signals import read_scoring, read_signals
from adpa.data.sequences import TokenIds
from adpa.errors import DataError, OptionError
from adpa.pipeline.option_checks import check_not_empty
from adpa.pipeline.options import (
    AllowControlTokensOption,
    AttnImplementationOption,
    BatchTokensOption,
    ChatTemplateKwargsOption,
    DeviceOption,
    DropInvalidOption,
    DtypeOption,
    EngineArgOption,
    EngineOption,
    GpuMemoryUtilizationOption,
    Group,
    LimitOption,
    MapOption,
    MaxNewTokensOption,
    MaxPromptLengthOption,
    PathOrName,
    QuantizationOption,
    RenderedOption,
    SamplesPerPromptOption,
    SamplingSeedOption,
    SamplingTopPOption,
    SplitOption,
    TeacherOption,
    TemperatureOption,
    TensorParallelOption,
    TrustRemoteCodeOption,
)
from adpa.pipeline.precompute import PrecomputeReport, precompute
from adpa.pipeline.scoring.request import DataOptions, EngineOptions, SamplingOptions
from adpa.pipeline.scoring.vllm_options import VllmOptions

NGRAM = 4
NOTE = (
    "The implicit reward, log π_teacher − log π_reference of a response, is also what ADPA trains on: a win here shows "
    "that training did what it was asked to, and is no proof of better answers. low and high are the ends of 95 % "
    "bootstrap intervals over the prompts."
)


@dataclass(frozen=True)
class AnswerSummary:
    """What a model's responses are like; every number is a mean over its responses.

    Attributes:
        implicit_reward: the sum over the response's tokens, in nats.
        implicit_reward_per_token: the mean over the response's tokens, in nats.
        tokens: length, with the end-of-turn token.
        ended: share of the responses that ended by themselves and were not cut at ``max_new_tokens``.
        repetition: see ``repetition``.
    """

    implicit_reward: float
    implicit_reward_per_token: float
    tokens: float
    ended: float
    repetition: float


@dataclass(frozen=True)
class EvaluateReport:
    """The result of ``evaluate``. Intervals are of 95 %, of the bootstrap over the prompts, which both models share.

    Attributes:
        student: what the student's responses are like.
        baseline: what the baseline's responses are like.
        win_rate: share of responses whose implicit reward is above that of the baseline's; a tie counts one half.
        win_rate_per_token: the same by the implicit reward per token, which a longer response does not raise.
        difference: the student's implicit reward minus the baseline's, in nats.
        difference_per_token: the same per token.
        prompts: distinct prompts.
        repeated_prompts: pairs left out because another one has the same prompt.
        truncated_prompts: prompts cut to ``max_prompt_length``.
        thinking_left_out: rows with thinking in earlier turns that the chat template leaves out.
        dropped: rows left out because of ``drop_invalid``.
        dropped_by_reason: the same by reason.
        sampled: responses sampled now, by both models.
        scored: responses scored now.
        engine: what ran the models.
        engine_reason: why it was this one.
        note: what the numbers do not show.
        seconds: wall-clock time.
    """

    student: AnswerSummary
    baseline: AnswerSummary
    win_rate: Interval
    win_rate_per_token: Interval
    difference: Interval
    difference_per_token: Interval
    prompts: int
    repeated_prompts: int
    truncated_prompts: int
    thinking_left_out: int
    dropped: int
    dropped_by_reason: dict[str, int]
    sampled: int
    scored: int
    engine: str
    engine_reason: str
    note: str
    seconds: float


def evaluate(
    student: Annotated[
        PathOrName, Doc("The trained model: a directory, or org/name[@revision] of the Hub."), Group.DECIDE
    ],
    baseline: Annotated[
        PathOrName, Doc("The model that it is compared with, such as the student before training."), Group.DECIDE
    ],
    teacher: TeacherOption,
    reference: Annotated[PathOrName, Doc("The large model before preference training."), Group.DECIDE],
    data: Annotated[
        PathOrName,
        Doc("Held-out prompts, alone or in preference pairs, in the forms of precompute; they are answered."),
        Group.DECIDE,
    ],
    show: Annotated[int, Doc("Show the answers of both models to so many prompts, side by side."), Group.OTHER] = 0,
    cache: Annotated[
        Location | None,
        Doc("Directory or URL whose evaluation/ keeps samples and scores, so that a run can go on; else nothing is."),
        Group.SAVING,
    ] = None,
    split: SplitOption = None,
    limit: LimitOption = None,
    map: MapOption = None,
    max_prompt_length: MaxPromptLengthOption = 1024,
    drop_invalid: DropInvalidOption = False,
    chat_template_kwargs: ChatTemplateKwargsOption = None,
    rendered: RenderedOption = False,
    allow_control_tokens: AllowControlTokensOption = False,
    samples_per_prompt: SamplesPerPromptOption = 1,
    temperature: TemperatureOption = 1.0,
    sampling_top_p: SamplingTopPOption = 1.0,
    max_new_tokens: MaxNewTokensOption = 512,
    seed: SamplingSeedOption = 0,
    engine: EngineOption = "auto",
    tensor_parallel: TensorParallelOption = 1,
    quantization: QuantizationOption = None,
    gpu_memory_utilization: GpuMemoryUtilizationOption = 0.9,
    engine_arg: EngineArgOption = None,
    batch_tokens: BatchTokensOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    attn_implementation: AttnImplementationOption = None,
    trust_remote_code: TrustRemoteCodeOption = False,
) -> EvaluateReport:
    """Compare a student with a baseline on held-out prompts, without a judge.

    Both answer every prompt, with the same seed. Teacher and reference score the answers. The implicit reward of an
    answer, log π_teacher − log π_reference, is also what ADPA trains on: a win does not prove better answers. The
    report also has lengths and repetition, because a student can raise such a reward by long or repeated text.

    Raises:
        AdpaError: a problem with the arguments, the data, the checkpoints or the cache that the caller can solve.
    """
    started = time.perf_counter()
    names = {"--student": student, "--baseline": baseline, "--teacher": teacher, "--reference": reference}
    check_not_empty(names)
    max_length = max_prompt_length + max_new_tokens
    SamplingOptions(samples_per_prompt, temperature, sampling_top_p, max_new_tokens, seed).check()
    pairs = DataOptions(
        source=data,
        split=split,
        limit=limit,
        map=map,
        max_prompt_length=max_prompt_length,
        max_length=max_length,
        drop_invalid=drop_invalid,
        chat_template_kwargs=dict(chat_template_kwargs or {}),
        rendered=rendered,
        allow_control_tokens=allow_control_tokens,
        prompts_alone=True,
    )
    pairs.check()
    vllm = VllmOptions(tensor_parallel, quantization, None, gpu_memory_utilization, "auto", tuple(engine_arg or ()))
    EngineOptions(engine, vllm, batch_tokens, dtype, device).check()
    _check_inputs(names, pairs, cache)
    with TemporaryDirectory(prefix="adpa-evaluation-") as temporary:
        folder: Location = cache / "evaluation" if cache else Path(temporary)  # apart from what training reads
        ask = partial(
            precompute,
            teacher=teacher,
            reference=reference,
            data=data,
            cache=folder,
            split=split,
            limit=limit,
            map=map,
            top_k=1,  # only the response's own tokens are read
            max_prompt_length=max_prompt_length,
            max_length=max_length,
            drop_invalid=drop_invalid,
            chat_template_kwargs=chat_template_kwargs,
            rendered=rendered,
            allow_control_tokens=allow_control_tokens,
            samples_per_prompt=samples_per_prompt,
            temperature=temperature,
            sampling_top_p=sampling_top_p,
            max_new_tokens=max_new_tokens,
            seed=seed,
            engine=engine,
            tensor_parallel=tensor_parallel,
            quantization=quantization,
            gpu_memory_utilization=gpu_memory_utilization,
            engine_arg=engine_arg,
            batch_tokens=batch_tokens,
            dtype=dtype,
            device=device,
        )
        if ask(student=baseline, dry_run=True).prompts < 2:  # also checks everything else before the long work
            raise DataError(f"{data}: all its prompts are one and the same", "give at least two, and better hundreds")
        by_student, by_baseline = ask(student=student), ask(student=baseline)
        mine, theirs = (_read_answers(folder, done, samples_per_prompt) for done in (by_student, by_baseline))
    assert mine.prompts == theirs.prompts, "both answer the same data"
    return EvaluateReport(
        student=mine.summary(),
        baseline=theirs.summary(),
        win_rate=_over_prompts(win_share(mine.reward, theirs.reward)),
        win_rate_per_token=_over_prompts(win_share(mine.per_token, theirs.per_token)),
        difference=_over_prompts(mine.reward - theirs.reward),
        difference_per_token=_over_prompts(mine.per_token - theirs.per_token),
        prompts=len(mine.prompts),
        repeated_prompts=mine.repeated_prompts,
        truncated_prompts=by_student.truncated_prompts,
        thinking_left_out=by_student.thinking_left_out,
        dropped=by_student.dropped,
        dropped_by_reason=by_student.dropped_by_reason,
        sampled=by_student.sampled + by_baseline.sampled,
        scored=by_student.scored + by_baseline.scored,
        engine=by_student.engine,
        engine_reason=by_student.engine_reason,
        note=NOTE,
        seconds=time.perf_counter() - started,
    )


def _check_inputs(names: Mapping[str, str], pairs: DataOptions, cache: Location | None) -> None:
    """Checks what is read and written; the names of the models are by their options."""
    from adpa.pipeline.models.model_names import is_same
    from adpa.pipeline.scoring.inputs import check_inputs, check_reference  # a client of the Hub: not for --help

    if cache is not None:
        check_writable("--cache", cache)
        check_new_cache("--cache", cache)
    student, baseline = names["--student"], names["--baseline"]
    if is_same(student, baseline):
        raise _same_weights(student, baseline)
    check_reference(names["--reference"], names["--teacher"])
    check_inputs(names, pairs)

    from adpa.pipeline.models.checkpoint import open_checkpoint  # imports torch: after all that needs no weights

    if open_checkpoint(student).identity.digest == open_checkpoint(baseline).identity.digest:
        raise _same_weights(student, baseline)


def _same_weights(student: str, baseline: str) -> OptionError:
    return OptionError(
        f"--baseline {baseline}: it has the weights of --student {student}, so that there is nothing to compare",
        "name the model before training, or another one",
    )


def repetition(response_ids: TokenIds) -> float:
    """The share of repeated 4-grams of tokens: 1 − distinct / all; 0 for a response of fewer than 4 tokens.

    Args:
        response_ids: int32 [T].
    """
    if len(response_ids) < NGRAM:
        return 0.0
    ngrams = np.lib.stride_tricks.sliding_window_view(response_ids, NGRAM)
    return 1 - len(np.unique(ngrams, axis=0)) / len(ngrams)


@dataclass(frozen=True)
class _Answers:
    """A model's answers; arrays are float64 [P, M]."""

    prompts: list[bytes]
    repeated_prompts: int
    reward: NDArray[np.float64]
    tokens: NDArray[np.float64]
    ended: NDArray[np.float64]
    repetition: NDArray[np.float64]

    @property
    def per_token(self) -> NDArray[np.float64]:
        return self.reward / self.tokens

    def summary(self) -> AnswerSummary:
        return AnswerSummary(
            implicit_reward=float(self.reward.mean()),
            implicit_reward_per_token=float(self.per_token.mean()),
            tokens=float(self.tokens.mean()),
            ended=float(self.ended.mean()),
            repetition=float(self.repetition.mean()),
        )


def _read_answers(cache: Location, done: PrecomputeReport, samples_per_prompt: int) -> _Answers:
    """What a run of ``precompute`` sampled and scored; the first one of several pairs with the same prompt."""
    responses = next(one for one in read_response_sets(cache) if one.id == done.responses["sampled"])
    signals = read_signals(cache, read_scoring(cache, done.scoring))
    sequences, numbers = responses.sequences(), signals.locate(responses.table["key"])
    firsts: dict[bytes, int] = {}  # where the M responses to a prompt begin; they stand together
    for start in range(0, len(sequences), samples_per_prompt):
        firsts.setdefault(sequences[start].prompt_ids.tobytes(), start)

    def measure(row: int) -> tuple[float, float, float, float]:
        advantages_T = signals.row(int(numbers[row])).token_advantages
        assert advantages_T is not None, "a scoring without a reference"
        response_ids = sequences[row].response_ids
        ended = int(response_ids[-1]) in responses.info.ends
        return float(advantages_T.sum(dtype=np.float64)), len(response_ids), float(ended), repetition(response_ids)

    measured = np.array([[measure(start + m) for m in range(samples_per_prompt)] for start in firsts.values()])
    repeated = len(sequences) // samples_per_prompt - len(firsts)
    return _Answers(list(firsts), repeated, *np.moveaxis(measured, -1, 0))


def _over_prompts(values_PM: NDArray[np.float64]) -> Interval:
    return bootstrap_interval(values_PM.mean(axis=1)[None])
