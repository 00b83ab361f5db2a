"""Stage one: asks the large models once and keeps what they said."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

from typing_extensions import Doc

from adpa.data.cache.format import find_version, prepare_cache
from adpa.data.cache.locations import Location, check_writable
from adpa.data.cache.responses import (
    RESPONSE_NAMES,
    ResponseName,
    ResponseSet,
    ResponseSetInfo,
    Sampling,
    make_response_set,
    write_response_set,
)
from adpa.data.cache.samples import SampleRequest, missing_requests, read_samples
from adpa.data.cache.signal_rows import plain_bytes
from adpa.data.cache.signals import Scoring
from adpa.data.cache.tokenizers import write_tokenizer
from adpa.data.encoding import EncodedPair, Encoder
from adpa.data.preferences import read_rows
from adpa.data.sequences import TokenIds, TokenSequence
from adpa.data.vocabulary import digest_tokenizer, find_turn_end
from adpa.errors import CacheError, DataError, OptionError
from adpa.pipeline.models.checkpoint import resolve_device
from adpa.pipeline.options import (
    BatchTokensOption,
    DeviceOption,
    DropInvalidOption,
    DtypeOption,
    EngineArgOption,
    EngineOption,
    GpuMemoryUtilizationOption,
    HeadDtype,
    MaxNewTokensOption,
    MaxPromptLengthOption,
    QuantizationOption,
    SamplesPerPromptOption,
    SamplingSeedOption,
    SamplingTopPOption,
    SplitOption,
    TeacherOption,
    TemperatureOption,
    TensorParallelOption,
)
from adpa.pipeline.scoring.engine import choose_engine
from adpa.pipeline.scoring.executor import ExecutorName, ExecutorOptions
from adpa.pipeline.scoring.jobs import Executor, make_batches
from adpa.pipeline.scoring.opened_models import open_models
from adpa.pipeline.scoring.parts import PartPrompts, parse_part
from adpa.pipeline.scoring.probe import ProbeReport, Work, probe_signals
from adpa.pipeline.scoring.sample import Sampler, sample_responses, sampling_batches
from adpa.pipeline.scoring.score import missing_sequences, score
from adpa.pipeline.scoring.vllm_options import VllmOptions


@dataclass(frozen=True)
class PrecomputeReport:
    """What ``precompute`` did; with ``dry_run``, what it would do at most.

    Attributes:
        scored: token sequences scored now.
        reused: token sequences whose signals were already there.
        sampled: responses sampled now.
        awaited: responses that other parts of the data have still to sample; until then there is no sampled set.
        tokens: response tokens scored now.
        bytes: size of the files written for them; with ``dry_run``, what a probe predicts for them, or without one what
            they take at most, with K ids a token and no encoding.
        truncated_prompts: prompts cut to ``max_prompt_length``.
        truncated_responses: responses that lack their end-of-turn token: cut to ``max_length`` or ``max_new_tokens``;
            like ``truncated_prompts`` and ``dropped`` of the whole data, as far as it is sampled, and not of a part.
        dropped: pairs left out because of ``drop_invalid``.
        engine: what ran the models, as in ``scoring.json``.
        engine_reason: why it was this one.
        workers: processes that ran each model, if there was work for all of them.
        part: which part of the data was sampled and scored, as i/n.
        scoring: the scoring's id.
        responses: the id of each response set.
        seconds: wall-clock time.
        dry_run: whether nothing was sampled or written, and nothing scored but the responses of a probe.
        probe: what the probe of a dry run measured.
    """

    scored: int
    reused: int
    sampled: int
    awaited: int
    tokens: int
    bytes: int
    truncated_prompts: int
    truncated_responses: int
    dropped: int
    engine: str
    engine_reason: str
    workers: int
    part: str
    scoring: str
    responses: dict[str, str]
    seconds: float
    dry_run: bool
    probe: ProbeReport | None = None


def precompute(
    teacher: TeacherOption,
    data: Annotated[str, Doc("Preference pairs: a JSONL, JSON or Parquet file, a datasets directory, a Hub name.")],
    cache: Annotated[
        Location,
        Doc("Directory of the teacher-signal cache, shared by all students; or a URL such as s3://bucket/folder."),
    ],
    reference: Annotated[
        str | None, Doc("The large model before preference training; with it, tokens get advantages.")
    ] = None,
    student: Annotated[str | None, Doc("The model whose own responses are sampled and scored.")] = None,
    responses: Annotated[
        str | None,
        Doc("Responses to score, with commas; default: chosen,rejected, or sampled with --student."),
    ] = None,
    split: SplitOption = None,
    top_k: Annotated[int, Doc("Ids of highest teacher probability kept for each response token.")] = 50,
    top_p: Annotated[
        float,
        Doc(
            "Of the teacher's signals keep only the fewest of these ids that have this much probability together; "
            "1 keeps all. Sampling has --sampling-top-p."
        ),
    ] = 1.0,
    lossy: Annotated[
        bool, Doc("Round the signals to about 60% of their size; what that changes is kept beside them.")
    ] = False,
    max_prompt_length: MaxPromptLengthOption = 1024,
    max_length: Annotated[int, Doc("Tokens of prompt and response together; the response is cut.")] = 2048,
    drop_invalid: DropInvalidOption = False,
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
    ] = None,
    gpu_memory_utilization: GpuMemoryUtilizationOption = 0.9,
    head_dtype: Annotated[
        HeadDtype, Doc("vLLM: dtype of the head; model is vLLM's own head, auto is float32 unless it is quantized.")
    ] = "auto",
    engine_arg: EngineArgOption = None,
    batch_tokens: BatchTokensOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    dry_run: Annotated[
        bool, Doc("Count rows, tokens and bytes; write nothing, and ask no model without --probe.")
    ] = False,
    executor: Annotated[
        ExecutorName, Doc("Where the models are asked: here, in this process, or by several workers of a Ray cluster.")
    ] = "here",
    workers: Annotated[
        int | None, Doc("Ray: workers, each with a model of its own, on its own GPUs or its share of the CPUs.")
    ] = None,
    ray_address: Annotated[
        str | None, Doc("Ray: cluster to join, as host:port, or auto; default: one is started on this machine.")
    ] = None,
    part: Annotated[
        str | None,
        Doc("i/n: sample and score only the i-th of n parts of the data; the other parts are for other machines."),
    ] = None,
    probe: Annotated[
        int | None,
        Doc("With --dry-run: score so many responses to see what each K would keep, and to predict bytes and hours."),
    ] = None,
) -> PrecomputeReport:
    """Score responses with the teacher, and the reference beside it, and keep the signals in a cache.

    What the cache already has is not scored again: a killed run is resumed by running it again, and grown data costs
    only its new rows. With a student, its own responses to the prompts are sampled and scored; the chosen responses
    are then stored too, unscored, for the SFT term. A dry run with a probe says what it would cost and what K keeps.

    Raises:
        AdpaError: something about the arguments, the data, the checkpoints or the cache that the caller can put right.
    """
    started = time.perf_counter()
    names = _response_names(responses, student)
    _check_at_least_one(
        {
            "--top-k": top_k,
            "--samples-per-prompt": samples_per_prompt,
            "--max-new-tokens": max_new_tokens,
            "--batch-tokens": batch_tokens,
            "--probe": probe,
        }
    )
    _check_probabilities({"--top-p": top_p, "--sampling-top-p": sampling_top_p})
    if temperature < 0:
        raise OptionError(f"--temperature {temperature:g}; expected 0 or more")
    if probe is not None and not dry_run:
        raise OptionError(f"--probe {probe} without --dry-run", "a probe scores a few responses and writes nothing")
    parsed_part = parse_part(part)
    check_writable("--cache", cache)
    find_version(cache)  # one that this program must not write to is refused at once
    torch_device = resolve_device(device)
    execution = ExecutorOptions(executor, workers, ray_address)
    execution.check(torch_device)
    if executor == "ray":
        cache = cache.absolute()  # workers have a working directory of their own
    models = open_models(teacher, reference, student, top_k)
    options = VllmOptions(
        tensor_parallel, quantization, max_model_len, gpu_memory_utilization, head_dtype, tuple(engine_arg or ())
    )
    dtypes = models.dtypes(dtype)
    runs_on = choose_engine(engine, options, torch_device, models.by_name(), dtypes)
    models.check_reference()
    scoring_tokens = batch_tokens or runs_on.scoring_tokens(models.by_name(), dtypes)
    sampling_tokens = 0  # where nothing is sampled
    if models.student is not None:
        sampling_tokens = batch_tokens or runs_on.sampling_tokens(
            models.student, dtypes["student"], max_new_tokens, sampling_top_p
        )

    tokenizer = models.teacher.tokenizer
    encoder = Encoder(tokenizer, find_turn_end(tokenizer), max_prompt_length, max_length, drop_invalid)
    pairs = list(encoder.encode(read_rows(data, split)))
    if not pairs:
        raise DataError(f"{data}: all of its {encoder.counts.dropped} pairs were dropped", "mend the data")
    longest = models.check_data(pairs, names, max_new_tokens, runs_on)
    own = PartPrompts(parsed_part, (pair.prompt_ids for pair in pairs))
    sets = _preference_sets(pairs, encoder, names)
    scoring = Scoring(
        teacher=models.teacher.identity,
        reference=models.reference.identity if models.reference else None,
        vocabulary=sets["chosen"].info.vocabulary,
        top_k=top_k,
        dtype=dtypes["teacher"],
        engine=runs_on.name,
        top_p=top_p,
        lossy=lossy,
    )
    requests = [
        (pair.example_id, SampleRequest(pair.prompt_ids, index))
        for pair in pairs
        for index in range(samples_per_prompt if models.student else 0)
    ]
    own_requests = [request for _, request in requests if request.prompt_ids in own]
    given = make_batches(list(_wanted(sets, names, own).values()), len, scoring_tokens)
    execution.check_batches(max(len(given), len(sampling_batches(own_requests, max_new_tokens, sampling_tokens))))
    if not dry_run:
        prepare_cache(cache)

    unsampled: list[SampleRequest] = []
    awaited = written = 0
    open_scorer = partial(models.open_scorer, runs_on, longest)
    with execution.open(runs_on.gpus, cache) as run:
        if models.student is not None:
            sampling = Sampling(
                student=models.student.identity.digest,
                turn_end=encoder.turn_end.token_id,
                temperature=temperature,
                top_p=sampling_top_p,
                max_new_tokens=max_new_tokens,
                samples_per_prompt=samples_per_prompt,
                seed=seed,
                dtype=dtypes["student"],
                engine=runs_on.sampling_name,
            )
            unsampled = missing_requests(cache, sampling, own_requests)
            said = read_samples(cache, sampling)
            if not dry_run:
                open_sampler = partial(models.open_sampler, runs_on, longest, sampling)
                said = _sample(cache, sampling, own_requests, unsampled, open_sampler, sampling_tokens, run)
            sets["sampled"] = _sampled_set(sets["chosen"].info, sampling, requests, said)
            awaited = len({request.key for _, request in requests if request.prompt_ids not in own} - said.keys())
        wanted = _wanted(sets, names, own)
        # A set is never made of a part of its samples: of the parts of the data, one that finds those of all makes it.
        finished = {name: found for name, found in sets.items() if name != "sampled" or not awaited}
        if not dry_run:  # before it is looked what is missing: what sets need is nobody's garbage
            for responses_of in finished.values():
                write_response_set(cache, responses_of)
            write_tokenizer(cache, tokenizer, sets["chosen"].info.tokenizer)
        missing = missing_sequences(cache, scoring, list(wanted.values()))
        if not dry_run:
            written = score(cache, scoring, missing, partial(open_scorer, scoring), scoring_tokens, run)

    planned = len(unsampled) if dry_run else 0
    tokens = sum(len(sequence.response_ids) for sequence in missing) + planned * max_new_tokens
    probed = None
    if probe is not None:
        probed = probe_signals(
            probe,
            Work(list(wanted.values()), missing, unsampled, max_new_tokens),
            sets["chosen"].sequences(),
            scoring,
            open_scorer,
            student=models.student.identity if models.student else None,
            vocabulary=models.teacher.config.vocab_size,
            batch_tokens=scoring_tokens,
            pads=runs_on.pads,
        )
    if dry_run:
        written = tokens * plain_bytes(top_k, reference is not None) if probed is None else probed.predict_bytes(tokens)
    return PrecomputeReport(
        scored=len(missing) + planned,
        reused=len(wanted) - len(missing),
        sampled=len(unsampled),
        awaited=awaited,
        tokens=tokens,
        bytes=written,
        truncated_prompts=encoder.counts.truncated_prompts,
        truncated_responses=sum(sets[name].info.truncated_responses for name in names),
        dropped=encoder.counts.dropped,
        engine=runs_on.name,
        engine_reason=runs_on.reason,
        workers=workers or 1,
        part=str(parsed_part),
        scoring=scoring.id,
        responses={name: found.id for name, found in finished.items()},
        seconds=time.perf_counter() - started,
        dry_run=dry_run,
        probe=probed,
    )


def _sample(
    cache: Location,
    sampling: Sampling,
    requests: Sequence[SampleRequest],
    missing: Sequence[SampleRequest],
    open_sampler: Callable[[], Sampler],
    batch_tokens: int,
    run: Executor,
) -> dict[bytes, TokenIds]:
    """Samples what is missing of some requests, and gives the responses to all of them, and those of other parts."""
    sample_responses(cache, sampling, missing, open_sampler, batch_tokens, run)
    said = read_samples(cache, sampling)
    lost = _unanswered(requests, said)
    if lost:  # samples of no set are garbage after a day: a gc beside this run may have removed some just now
        sample_responses(cache, sampling, lost, open_sampler, batch_tokens, run)
        said |= read_samples(cache, sampling)
        lost = _unanswered(requests, said)
    if lost:
        raise CacheError(f"{cache}: {len(lost)} samples that this run made are gone", "see what removes files there")
    return said


def _unanswered(requests: Sequence[SampleRequest], said: Mapping[bytes, TokenIds]) -> list[SampleRequest]:
    return list({request.key: request for request in requests if request.key not in said}.values())


def _sampled_set(
    info: ResponseSetInfo,
    sampling: Sampling,
    requests: Sequence[tuple[str, SampleRequest]],
    said: Mapping[bytes, TokenIds],
) -> ResponseSet:
    """What there is of the sampled responses, beside the chosen ones of this description."""
    rows = [(example, asked.prompt_ids, said[asked.key]) for example, asked in requests if asked.key in said]
    return make_response_set(replace(info, name="sampled", sampling=sampling), rows)


def _wanted(
    sets: Mapping[ResponseName, ResponseSet], names: Sequence[ResponseName], own: PartPrompts
) -> dict[bytes, TokenSequence]:
    """The sequences of the part that are to be scored, of the sets that there are."""
    sequences = (sequence for name in names if name in sets for sequence in sets[name].sequences())
    return {sequence.key: sequence for sequence in sequences if sequence.prompt_ids in own}


def _response_names(responses: str | None, student: str | None) -> list[ResponseName]:
    if responses is None:
        return ["sampled"] if student else ["chosen", "rejected"]
    given = [name.strip() for name in responses.split(",")]
    unknown = [name for name in given if name not in RESPONSE_NAMES]
    if unknown:
        raise OptionError(f"--responses {responses}: found {unknown[0]!r}; expected {', '.join(RESPONSE_NAMES)}")
    if ("sampled" in given) != (student is not None):
        raise OptionError(
            f"--responses {responses} {'without' if student is None else 'with'} --student",
            "sampled responses need the student that samples them, and a student is for nothing else",
        )
    return [name for name in RESPONSE_NAMES if name in given]


def _check_at_least_one(options: Mapping[str, int | None]) -> None:
    for option, value in options.items():
        if value is not None and value < 1:
            raise OptionError(f"{option} {value}; expected at least 1")


def _check_probabilities(options: Mapping[str, float]) -> None:
    for option, value in options.items():
        if not 0 < value <= 1:
            raise OptionError(f"{option} {value:g}; expected more than 0 and at most 1")


def _preference_sets(
    pairs: Sequence[EncodedPair], encoder: Encoder, names: Sequence[ResponseName]
) -> dict[ResponseName, ResponseSet]:
    """The chosen responses, which every objective needs, and the rejected ones if they are named."""
    digests = digest_tokenizer(encoder.tokenizer)
    info = ResponseSetInfo(
        name="chosen",
        tokenizer=digests.tokenizer,
        vocabulary=digests.vocabulary,
        chat_template=digests.chat_template,
        turn_end=encoder.turn_end.token_id,
        max_prompt_length=encoder.max_prompt_length,
        max_length=encoder.max_length,
        truncated_prompts=encoder.counts.truncated_prompts,
        dropped=encoder.counts.dropped,
    )
    sets: dict[ResponseName, ResponseSet] = {
        "chosen": make_response_set(info, [(pair.example_id, pair.prompt_ids, pair.chosen_ids) for pair in pairs])
    }
    if "rejected" in names:
        rejected = [(pair.example_id, pair.prompt_ids, pair.rejected_ids) for pair in pairs]
        sets["rejected"] = make_response_set(replace(info, name="rejected"), rejected)
    return sets
