"""Compares two trained models on held-out prompts by the implicit reward of a teacher and its reference.

``data/answers.py`` defines the numbers.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

from typing_extensions import Doc

from adpa.data.answers import (
    Answers,
    Comparison,
    compare_answers,
    perplexity,
    read_answers,
    student_rewards,
)
from adpa.data.cache.format import check_new_cache
from adpa.data.cache.locations import Location, check_writable
from adpa.data.cache.signals import read_signals
from adpa.data.sequences import TokenIds
from adpa.data.shown_answers import ShownPrompt, first_prompts, read_questions, show_answers
from adpa.errors import DataError, OptionError
from adpa.pipeline.option_checks import COUNT_OR_0, check_not_empty, takes_options
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
from adpa.pipeline.scoring.executor import ExecutorOptions
from adpa.pipeline.scoring.parts import WHOLE
from adpa.pipeline.scoring.request import DataOptions, EngineOptions, Request, SamplingOptions, SignalOptions
from adpa.pipeline.scoring.vllm_options import VllmOptions
from adpa.pipeline.training.evaluations import record_evaluation

if TYPE_CHECKING:
    from adpa.pipeline.scoring.plan import Plan

NOTE = (
    "The implicit reward, log π_teacher − log π_reference of a response, is also what ADPA trains on: a win here shows "
    "that training did what it was asked to, and is no proof of better answers. The brackets hold 95 % "
    "bootstrap intervals over the prompts."
)


@dataclass(frozen=True)
class EvaluateReport(Comparison):
    """The result of ``evaluate``: the comparison of the sampled answers, and more.

    Attributes:
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
        temperature: of the sampled answers; at 0 they are the greedy ones.
        greedy: the same comparison of greedy answers, one of each model to a prompt.
        answered_greedily: greedy answers given now, by both models.
        scored_by_students: chosen and rejected responses scored now by student and baseline.
        student_perplexity: the student's perplexity on the chosen responses; see ``perplexity``.
        baseline_perplexity: the baseline's.
        reward_accuracy: share of the pairs whose chosen response gets the larger reward log π_student − log π_baseline;
            see ``student_rewards``. None if no pair has two different responses.
        reward_margin: the reward of the chosen response minus that of the rejected one, mean over the pairs, in nats.
        reward_pairs: number of these pairs.
        truncated_responses: chosen and rejected responses cut to ``max_prompt_length + max_new_tokens`` tokens with
            their prompts.
        shown: the answers to the first ``show`` prompts.
    """

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
    temperature: float = 1.0
    greedy: Comparison | None = None
    answered_greedily: int = 0
    scored_by_students: int = 0
    student_perplexity: float | None = None
    baseline_perplexity: float | None = None
    reward_accuracy: float | None = None
    reward_margin: float | None = None
    reward_pairs: int = 0
    truncated_responses: int = 0
    shown: list[ShownPrompt] = field(default_factory=list)


@takes_options
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
    show: Annotated[int, Doc("Show the answers of both models to so many prompts, side by side."), Group.SAMPLING] = 0,
    cache: Annotated[
        Location | None,
        Doc("Directory or URL whose evaluation/ keeps samples and scores, so that a run can go on; default: none."),
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

    Both answer every prompt twice: sampled at --temperature, with the same seed, --samples-per-prompt answers each; and
    greedily, one answer each. Teacher and reference score the answers. The implicit reward of an answer, log π_teacher
    − log π_reference, is also what ADPA trains on: a win does not prove better answers. The report also has lengths and
    repetition, because a student can raise such a reward by long or repeated text. On the held-out pairs it has the
    perplexity of the chosen responses, and how often the student's own reward, log π_student − log π_baseline, prefers
    them to the rejected ones. Each model is loaded once.

    Raises:
        AdpaError: a problem with the arguments, the data, the checkpoints or the cache that the caller can solve.
    """
    options = dict(locals())
    started = time.perf_counter()
    names = {"--student": student, "--baseline": baseline, "--teacher": teacher, "--reference": reference}
    check_not_empty(names)
    COUNT_OR_0.check("--show", show)
    vllm = VllmOptions(tensor_parallel, quantization, None, gpu_memory_utilization, "auto", tuple(engine_arg or ()))
    with TemporaryDirectory(prefix="adpa-evaluation-") as temporary:
        request = Request(
            teacher=teacher,
            reference=reference,
            student=student,
            cache=cache / "evaluation" if cache else Path(temporary),  # apart from what training reads
            names=["sampled"],
            data=DataOptions(
                source=data,
                split=split,
                limit=limit,
                map=map,
                max_prompt_length=max_prompt_length,
                max_length=max_prompt_length + max_new_tokens,
                drop_invalid=drop_invalid,
                chat_template_kwargs=dict(chat_template_kwargs or {}),
                rendered=rendered,
                allow_control_tokens=allow_control_tokens,
                prompts_alone=True,
            ),
            signals=SignalOptions(top_k=1, top_p=1.0, lossy=False),  # only the response's own tokens are read
            sampling=SamplingOptions(samples_per_prompt, temperature, sampling_top_p, max_new_tokens, seed),
            engine=EngineOptions(engine, vllm, batch_tokens, dtype, device, attn_implementation, trust_remote_code),
            executor=ExecutorOptions(),
            part=WHOLE,
            dry_run=False,
            probe=None,
        )
        request.check()
        _check_inputs(names, request, cache)
        report = _evaluate(request, baseline, show, started)
    record_evaluation(student, options, asdict(replace(report, shown=[])))
    return report


def _evaluate(request: Request, baseline: str, show: int, started: float) -> EvaluateReport:
    # These import torch and transformers, which takes seconds: --help and a wrong value should not wait for them.
    from adpa.pipeline.scoring.comparison import compare_students, make_contestant
    from adpa.pipeline.scoring.plan import open_setup, read_pairs, with_student

    setup = open_setup(request)
    setups = (setup, with_student(request, setup, baseline))
    if len({one.models.student.identity.digest for one in setups if one.models.student}) < 2:
        raise _same_weights(str(request.student), baseline)
    pairs = read_pairs(request, setup)
    contestants = [make_contestant(request, one, pairs) for one in setups]
    plan = contestants[0].answers
    if plan.own.distinct < 2:
        raise DataError(
            f"{request.data.source}: all its prompts are one and the same", "give at least two, and better hundreds"
        )
    answered, scored = compare_students(request.cache, contestants)
    signals = read_signals(request.cache, plan.scoring)
    mine, theirs = (read_answers(one.sampled, signals) for one in answered)
    sampled = compare_answers(mine, theirs)
    greedy = compare_answers(*(read_answers(one.greedy, signals) for one in answered))
    own = [read_signals(request.cache, one.scoring) for one in contestants]
    sets = contestants[0].pairs.sets
    rewards = student_rewards(sets["chosen"], sets["rejected"], *own) if sets else None
    counts = pairs.encoder.counts
    return EvaluateReport(
        **vars(sampled),
        prompts=len(mine.first),
        repeated_prompts=mine.repeated_prompts,
        truncated_prompts=counts.truncated_prompts,
        thinking_left_out=counts.thinking_left_out,
        dropped=counts.dropped,
        dropped_by_reason=counts.reasons(),
        sampled=sum(one.sampled_now for one in answered),
        scored=scored,
        engine=setup.engine.name,
        engine_reason=setup.engine.reason,
        note=NOTE,
        seconds=time.perf_counter() - started,
        temperature=request.sampling.temperature,
        greedy=greedy,
        answered_greedily=sum(one.greedy_now for one in answered),
        scored_by_students=sum(one.scored_now for one in answered),
        student_perplexity=perplexity(sets["chosen"], own[0]) if sets else None,
        baseline_perplexity=perplexity(sets["chosen"], own[1]) if sets else None,
        reward_accuracy=None if rewards is None else rewards.reward_accuracy,
        reward_margin=None if rewards is None else rewards.reward_margin,
        reward_pairs=0 if rewards is None else rewards.pairs,
        truncated_responses=sum(one.info.truncated_responses for one in sets.values()),
        shown=_show(request.data, plan, mine, theirs, show),
    )


def _show(data: DataOptions, plan: "Plan", mine: Answers, theirs: Answers, count: int) -> list[ShownPrompt]:
    """The answers to the first prompts of the data; their ends of turn are left out."""
    assert plan.sampling is not None
    ends, tokenizer = plan.sampling.ends, plan.encoder.template.tokenizer
    prompts = first_prompts([(example_id, one.prompt_ids) for example_id, one in plan.samples], count)
    questions = read_questions(data.read(), data.rendered, {*prompts.values()})

    def decode(ids: TokenIds) -> str:
        said = ids[:-1] if int(ids[-1]) in ends else ids
        return str(tokenizer.decode(said, clean_up_tokenization_spaces=False))

    return show_answers(prompts, questions, mine, theirs, decode)


def _check_inputs(names: Mapping[str, str], request: Request, cache: Location | None) -> None:
    """Checks what is read and written; the names of the models are by their options."""
    from adpa.pipeline.models.model_names import is_same
    from adpa.pipeline.scoring.inputs import check_inputs, check_reference  # a client of the Hub: not for --help

    if cache is not None:
        for folder in (cache, request.cache):
            check_writable("--cache", folder)
            check_new_cache("--cache", folder)
    student, baseline = names["--student"], names["--baseline"]
    if is_same(student, baseline):
        raise _same_weights(student, baseline)
    check_reference(names["--reference"], names["--teacher"])
    check_inputs(names, request.data)


def _same_weights(student: str, baseline: str) -> OptionError:
    return OptionError(
        f"--baseline {baseline}: it has the weights of --student {student}, so that there is nothing to compare",
        "name the model before training, or another one",
    )
