"""Stage one: asks the large models once and keeps what they said."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from typing_extensions import Doc

from adpa.data.cache.format import check_new_cache
from adpa.data.cache.locations import Location, check_writable
from adpa.data.cache.signal_rows import plain_bytes
from adpa.pipeline.option_checks import takes_options
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
    HeadDtype,
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
from adpa.pipeline.scoring.executor import ExecutorName, ExecutorOptions
from adpa.pipeline.scoring.first_example import FirstExample, first_example
from adpa.pipeline.scoring.parts import parse_part
from adpa.pipeline.scoring.request import (
    DataOptions,
    EngineOptions,
    Request,
    SamplingOptions,
    SignalOptions,
    parse_responses,
)
from adpa.pipeline.scoring.vllm_options import VllmOptions

if TYPE_CHECKING:
    from adpa.data.reward_accuracy import RewardAccuracy
    from adpa.pipeline.scoring.plan import Plan, Setup
    from adpa.pipeline.scoring.probe import ProbeReport
    from adpa.pipeline.scoring.run import Outcome

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrecomputeReport:
    """What ``precompute`` did; with ``dry_run``, what it would do at most.

    Attributes:
        rows: pairs, or prompts alone, read; like all counts of pairs, of the whole data and not of a part.
        used: pairs that became token ids; the others were dropped.
        duplicates: pairs in use whose content is that of an earlier one.
        identical: pairs in use whose chosen and rejected response are the same tokens, maybe because both were cut.
        contradicting: pairs in use that prefer what an earlier pair with the same prompt rejects, and the reverse.
        scored: token sequences scored now.
        reused: token sequences whose signals were already there, or came from another process in the meantime.
        resumed: those of them that a stopped run left: they are in no response set of which all responses were scored
            before, the chosen and rejected responses of one data set taken together. 0 if nothing was missing.
        resumed_halves: token sequences scored now whose teacher's half a stopped run left.
        resumed_samples: responses that a stopped run sampled: no response set was made of them. 0 if none was missing.
        sampled: responses sampled now.
        awaited: responses that other parts of the data have still to sample; until then there is no sampled set.
        tokens: response tokens scored now.
        bytes: size of the files written for them; with ``dry_run``, what a probe predicts for them, or without one what
            they take at most, with K ids a token and no encoding.
        truncated_prompts: prompts cut to ``max_prompt_length``.
        truncated_responses: responses that lack their end-of-turn token: cut to ``max_length`` or ``max_new_tokens``;
            like ``truncated_prompts`` and ``dropped`` of the whole data, as far as it is sampled, and not of a part.
        thinking_left_out: rows with thinking in earlier turns that the chat template leaves out.
        dropped: rows left out because of ``drop_invalid``.
        dropped_by_reason: the same by reason.
        engine: what ran the models, as in ``scoring.json``.
        engine_reason: why it was this one.
        workers: processes that ran each model, if there was work for all of them.
        part: which part of the data was sampled and scored, as i/n.
        scoring: the scoring's id.
        responses: the id of each response set; of prompts alone there is no chosen one.
        seconds: wall-clock time.
        dry_run: whether nothing was sampled or written, and nothing scored but the responses of a probe.
        probe: what the probe of a dry run measured.
        reward_accuracy: share of the pairs in which Σ_t (log p_teacher − log p_reference) of the chosen response is
            larger than that of the rejected one. It is of the pairs in the part whose two responses have signals now,
            or of the probed pairs. None unless chosen and rejected responses are scored with a reference, or if no pair
            has its signals yet.
        reward_margin: chosen minus rejected, mean over these pairs, in nats; None like ``reward_accuracy``.
        reward_pairs: number of these pairs.
        prompts: distinct prompts of the whole data.
    """

    rows: int
    used: int
    duplicates: int
    identical: int
    contradicting: int
    scored: int
    reused: int
    resumed: int
    resumed_halves: int
    resumed_samples: int
    sampled: int
    awaited: int
    tokens: int
    bytes: int
    truncated_prompts: int
    truncated_responses: int
    thinking_left_out: int
    dropped: int
    dropped_by_reason: dict[str, int]
    engine: str
    engine_reason: str
    workers: int
    part: str
    scoring: str
    responses: dict[str, str]
    seconds: float
    dry_run: bool
    probe: "ProbeReport | None" = None
    reward_accuracy: float | None = None
    reward_margin: float | None = None
    reward_pairs: int = 0
    prompts: int = 0


@takes_options
def precompute(
    teacher: TeacherOption,
    data: Annotated[
        PathOrName,
        Doc(
            "Preference pairs: a JSONL, JSON, CSV or Parquet file, a folder of such files, a datasets directory, or "
            "org/name of the Hub, with :configuration or @revision."
        ),
        Group.DECIDE,
    ],
    cache: Annotated[
        Location,
        Doc("Directory of the teacher-signal cache, shared by all students; or a URL such as s3://bucket/folder."),
        Group.DECIDE,
    ],
    reference: Annotated[
        PathOrName | None,
        Doc("The large model before preference training; with it, tokens get advantages."),
        Group.DECIDE,
    ] = None,
    student: Annotated[
        PathOrName | None, Doc("The model whose own responses are sampled and scored."), Group.DECIDE
    ] = None,
    responses: Annotated[
        str | None,
        Doc("Responses to score, with commas; default: chosen,rejected, or sampled with --student."),
        Group.DATA,
    ] = None,
    split: SplitOption = None,
    limit: LimitOption = None,
    map: MapOption = None,
    top_k: Annotated[int, Doc("Ids of highest teacher probability kept for each response token."), Group.SIGNALS] = 50,
    top_p: Annotated[
        float,
        Doc(
            "Of the teacher's signals keep only the fewest of these ids that have this much probability together; "
            "1 keeps all. Sampling has --sampling-top-p."
        ),
        Group.SIGNALS,
    ] = 1.0,
    lossy: Annotated[
        bool, Doc("Round the signals to about 60% of their size; what that changes is kept beside them."), Group.SIGNALS
    ] = False,
    max_prompt_length: MaxPromptLengthOption = 1024,
    max_length: Annotated[int, Doc("Tokens of prompt and response together; the response is cut."), Group.DATA] = 2048,
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
    max_model_len: Annotated[
        int | None,
        Doc("vLLM: refuse data with sequences of more tokens; memory is reserved for the longest sequence present."),
        Group.ENGINE,
    ] = None,
    gpu_memory_utilization: GpuMemoryUtilizationOption = 0.9,
    head_dtype: Annotated[
        HeadDtype,
        Doc("vLLM: dtype of the head; model is vLLM's own head, auto is float32 unless it is quantized."),
        Group.ENGINE,
    ] = "auto",
    engine_arg: EngineArgOption = None,
    batch_tokens: BatchTokensOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    attn_implementation: AttnImplementationOption = None,
    trust_remote_code: TrustRemoteCodeOption = False,
    dry_run: Annotated[
        bool, Doc("Count rows, tokens and bytes; write nothing, and load no model without --probe."), Group.DRY_RUN
    ] = False,
    executor: Annotated[
        ExecutorName,
        Doc("Where the models run: here, in this process, or in several workers of a Ray cluster."),
        Group.SCALE,
    ] = "here",
    workers: Annotated[
        int | None,
        Doc("Ray: workers, each with a model of its own, on its own GPUs or its share of the CPUs."),
        Group.SCALE,
    ] = None,
    ray_address: Annotated[
        str | None,
        Doc("Ray: cluster to join, as host:port, or auto; default: one is started on this machine."),
        Group.SCALE,
    ] = None,
    part: Annotated[
        str | None,
        Doc("i/n: sample and score only the i-th of n parts of the data; the other parts are for other machines."),
        Group.SCALE,
    ] = None,
    probe: Annotated[
        int | None,
        Doc("With --dry-run: score so many responses to see what each K would keep, and to predict bytes and hours."),
        Group.DRY_RUN,
    ] = None,
    on_example: Callable[[FirstExample], None] | None = None,
) -> PrecomputeReport:
    """Score responses with the teacher, and the reference beside it, and keep the signals in a cache.

    Sequences with rows in the cache are not scored again. To resume a killed run, run it again; when data grows, only
    its new rows are scored. With a student, its own responses to the prompts are sampled and scored. The chosen
    responses are then stored too, unscored, for the SFT term; prompts alone have none. A dry run with a probe predicts
    the cost and says how much of the teacher's probability each K keeps. ``on_example`` gets the first example after
    all rows were checked and before a model is loaded.

    Raises:
        AdpaError: a problem with the arguments, the data, the checkpoints or the cache that the caller can solve.
    """
    started = time.perf_counter()
    vllm = VllmOptions(
        tensor_parallel, quantization, max_model_len, gpu_memory_utilization, head_dtype, tuple(engine_arg or ())
    )
    names = parse_responses(responses, student)
    request = Request(
        teacher=teacher,
        reference=reference,
        student=student,
        cache=cache,
        names=names,
        data=DataOptions(
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
            prompts_alone=names == ["sampled"],
        ),
        signals=SignalOptions(top_k, top_p, lossy),
        sampling=SamplingOptions(samples_per_prompt, temperature, sampling_top_p, max_new_tokens, seed),
        engine=EngineOptions(engine, vllm, batch_tokens, dtype, device, attn_implementation, trust_remote_code),
        executor=ExecutorOptions(executor, workers, ray_address),
        part=parse_part(part),
        dry_run=dry_run,
        probe=probe,
    )
    request.check()
    from adpa.pipeline.scoring.inputs import check_inputs, check_reference  # a client of the Hub: not for --help

    check_writable("--cache", cache)
    check_new_cache("--cache", cache)
    check_reference(reference, teacher)
    check_inputs({"--teacher": teacher, "--reference": reference, "--student": student}, request.data)
    if executor == "ray":
        request = replace(request, cache=cache.absolute())  # workers have a working directory of their own

    # These import torch and transformers, which takes seconds: --help and a wrong value should not wait for them.
    from adpa.pipeline.scoring.plan import make_plan, open_setup
    from adpa.pipeline.scoring.run import measure_rewards, probe_plan, run_plan

    setup = open_setup(request)
    plan = make_plan(request, setup)
    if on_example is not None:
        on_example(first_example(plan.encoder.template, plan.first))
    outcome = run_plan(request, setup, plan)
    probed = None if probe is None else probe_plan(request, probe, setup, plan, outcome)
    rewards = measure_rewards(request, plan, outcome) if probed is None else probed.rewards
    if rewards is not None and (warning := rewards.warning()):
        logger.warning(warning)
    return _report(request, setup, plan, outcome, probed, rewards, time.perf_counter() - started)


def _report(
    request: Request,
    setup: "Setup",
    plan: "Plan",
    outcome: "Outcome",
    probed: "ProbeReport | None",
    rewards: "RewardAccuracy | None",
    seconds: float,
) -> PrecomputeReport:
    planned = len(outcome.unsampled) if request.dry_run else 0
    counts = plan.encoder.counts
    tokens = sum(len(sequence.response_ids) for sequence in outcome.scored)
    tokens += planned * request.sampling.max_new_tokens
    size = outcome.bytes
    if request.dry_run:
        at_most = tokens * plain_bytes(request.signals.top_k, request.reference is not None)
        size = at_most if probed is None else probed.predict_bytes(tokens)
    return PrecomputeReport(
        rows=counts.rows,
        used=counts.used,
        duplicates=counts.duplicates,
        identical=counts.identical,
        contradicting=counts.contradicting,
        scored=len(outcome.scored) + planned,
        reused=len(outcome.wanted) - len(outcome.scored),
        resumed=outcome.resumed.sequences,
        resumed_halves=outcome.resumed.halves,
        resumed_samples=outcome.resumed.samples,
        sampled=len(outcome.unsampled),
        awaited=outcome.awaited,
        tokens=tokens,
        bytes=size,
        truncated_prompts=counts.truncated_prompts,
        truncated_responses=sum(outcome.sets[name].info.truncated_responses for name in request.names),
        thinking_left_out=counts.thinking_left_out,
        dropped=counts.dropped,
        dropped_by_reason=counts.reasons(),
        engine=setup.engine.name,
        engine_reason=setup.engine.reason,
        workers=request.executor.workers or 1,
        part=str(request.part),
        prompts=plan.own.distinct,
        scoring=plan.scoring.id,
        responses={name: one.id for name, one in outcome.finished.items()},
        seconds=seconds,
        dry_run=request.dry_run,
        probe=probed,
        reward_accuracy=None if rewards is None else rewards.reward_accuracy,
        reward_margin=None if rewards is None else rewards.reward_margin,
        reward_pairs=0 if rewards is None else rewards.pairs,
    )
