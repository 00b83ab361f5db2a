"""Stage one: asks the large models once and keeps what they said."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
from typing_extensions import Doc

from adpa.data.encoding import EncodedPair, Encoder
from adpa.data.preferences import read_rows
from adpa.data.responses import (
    RESPONSE_NAMES,
    ResponseName,
    ResponseSet,
    ResponseSetInfo,
    Sampling,
    make_response_set,
    write_response_set,
)
from adpa.data.samples import SampleRequest, missing_requests, read_samples
from adpa.data.signals import ModelIdentity, Scoring, signal_bytes
from adpa.data.vocabulary import check_same_vocabulary, digest_tokenizer, find_turn_end, write_tokenizer
from adpa.errors import DataError, OptionError
from adpa.pipeline.checkpoint import Checkpoint, DtypeName, open_checkpoint, resolve_device
from adpa.pipeline.directories import check_writable
from adpa.pipeline.sampling import sample_responses
from adpa.pipeline.scorer_hf import HfScorer
from adpa.pipeline.scoring import Scorer, missing_sequences, score

EngineName = Literal["auto", "hf", "vllm"]


@dataclass(frozen=True)
class PrecomputeReport:
    """What ``precompute`` did; with ``dry_run``, what it would do at most.

    Attributes:
        scored: token sequences scored now.
        reused: token sequences whose signals were already there.
        sampled: responses sampled now.
        tokens: response tokens scored now.
        bytes: size of the signals of these tokens.
        truncated_prompts: prompts cut to ``max_prompt_length``.
        truncated_responses: responses that lack their end-of-turn token: cut to ``max_length`` or ``max_new_tokens``.
        dropped: pairs left out because of ``drop_invalid``.
        scoring: the scoring's id.
        responses: the id of each response set.
        seconds: wall-clock time.
        dry_run: whether nothing was sampled, scored or written.
    """

    scored: int
    reused: int
    sampled: int
    tokens: int
    bytes: int
    truncated_prompts: int
    truncated_responses: int
    dropped: int
    scoring: str
    responses: dict[str, str]
    seconds: float
    dry_run: bool


def precompute(
    teacher: Annotated[str, Doc("The large preference-aligned model: a directory, or org/name[@revision] of the Hub.")],
    data: Annotated[str, Doc("Preference pairs: a JSONL, JSON or Parquet file, a datasets directory, a Hub name.")],
    cache: Annotated[Path, Doc("Directory of the teacher-signal cache, shared by all students.")],
    reference: Annotated[
        str | None, Doc("The large model before preference training; with it, tokens get advantages.")
    ] = None,
    student: Annotated[str | None, Doc("The model whose own responses are sampled and scored.")] = None,
    responses: Annotated[
        str | None,
        Doc("Responses to score, with commas; chosen,rejected unless given, or sampled with --student."),
    ] = None,
    split: Annotated[str | None, Doc("Split of a data set that has several.")] = None,
    top_k: Annotated[int, Doc("Ids of highest teacher probability kept for each response token.")] = 50,
    max_prompt_length: Annotated[int, Doc("Tokens of a prompt that are kept, from its end.")] = 1024,
    max_length: Annotated[int, Doc("Tokens of prompt and response together; the response is cut.")] = 2048,
    drop_invalid: Annotated[bool, Doc("Leave out pairs that cannot be used, and count them.")] = False,
    samples_per_prompt: Annotated[int, Doc("Responses sampled for each prompt.")] = 1,
    temperature: Annotated[float, Doc("Sampling temperature; 0 is greedy.")] = 1.0,
    top_p: Annotated[float, Doc("Nucleus of the sampling distribution.")] = 1.0,
    max_new_tokens: Annotated[int, Doc("Tokens of a sampled response at most.")] = 512,
    seed: Annotated[int, Doc("Seed of the sampling.")] = 0,
    engine: Annotated[EngineName, Doc("What runs the models; auto is hf.")] = "auto",
    batch_tokens: Annotated[int, Doc("Tokens of a batch, padding included; lower it when memory runs out.")] = 8192,
    dtype: Annotated[DtypeName, Doc("Dtype to compute in; auto is the checkpoint's own.")] = "auto",
    device: Annotated[str, Doc("cpu, cuda, cuda:1, …; auto is a GPU where there is one.")] = "auto",
    dry_run: Annotated[bool, Doc("Count rows, tokens and bytes; load no model and write nothing.")] = False,
) -> PrecomputeReport:
    """Score responses with the teacher, and the reference beside it, and keep the signals in a cache.

    What the cache already has is not scored again: a killed run is resumed by running it again, and grown data costs
    only its new rows. With a student, its own responses to the prompts are sampled and scored; the chosen responses
    are then stored too, unscored, for the SFT term.

    Raises:
        AdpaError: something about the arguments, the data, the checkpoints or the cache that the caller can put right.
    """
    started = time.perf_counter()
    names = _response_names(responses, student)
    _check_options(engine, top_k, samples_per_prompt, temperature, top_p, max_new_tokens, batch_tokens)
    check_writable("--cache", cache)
    torch_device = resolve_device(device)
    models = _open_models(teacher, reference, student, top_k)

    tokenizer = models.teacher.tokenizer
    encoder = Encoder(tokenizer, find_turn_end(tokenizer), max_prompt_length, max_length, drop_invalid)
    pairs = list(encoder.encode(read_rows(data, split)))
    if not pairs:
        raise DataError(f"{data}: all of its {encoder.counts.dropped} pairs were dropped", "mend the data")
    models.check_data(pairs, names, max_new_tokens)
    sets = _preference_sets(pairs, encoder, names)

    unsampled: list[SampleRequest] = []
    if models.student is not None:
        sampling = Sampling(
            student=models.student.identity.digest,
            turn_end=encoder.turn_end.token_id,
            temperature=temperature,
            top_p=top_p,
            max_new_tokens=max_new_tokens,
            samples_per_prompt=samples_per_prompt,
            seed=seed,
            dtype=models.student.dtype_name(dtype),
            engine="hf",
        )
        requests = [
            (pair.example_id, SampleRequest(pair.prompt_ids, index))
            for pair in pairs
            for index in range(samples_per_prompt)
        ]
        unsampled = missing_requests(cache, sampling, [request for _, request in requests])
        if not dry_run:
            sample_responses(cache, sampling, unsampled, models.student, torch_device, batch_tokens)
        said = read_samples(cache, sampling)
        rows = [
            (example_id, request.prompt_ids, said[request.key])
            for example_id, request in requests
            if request.key in said
        ]
        sets["sampled"] = make_response_set(replace(sets["chosen"].info, name="sampled", sampling=sampling), rows)

    scoring = Scoring(
        teacher=models.teacher.identity,
        reference=models.reference.identity if models.reference else None,
        vocabulary=sets["chosen"].info.vocabulary,
        top_k=top_k,
        dtype=models.teacher.dtype_name(dtype),
        engine="hf",
    )
    wanted = {sequence.key: sequence for name in names for sequence in sets[name].sequences()}
    missing = missing_sequences(cache, scoring, list(wanted.values()))
    if not dry_run:
        write_tokenizer(cache, tokenizer, sets["chosen"].info.tokenizer)
        for responses_of in sets.values():
            write_response_set(cache, responses_of)
        open_scorer = partial(models.open_scorer, dtype=scoring.dtype, device=torch_device)
        score(cache, scoring, missing, open_scorer, batch_tokens)

    planned = len(unsampled) if dry_run else 0
    tokens = sum(len(sequence.response_ids) for sequence in missing) + planned * max_new_tokens
    return PrecomputeReport(
        scored=len(missing) + planned,
        reused=len(wanted) - len(missing),
        sampled=len(unsampled),
        tokens=tokens,
        bytes=tokens * signal_bytes(top_k, reference is not None),
        truncated_prompts=encoder.counts.truncated_prompts,
        truncated_responses=sum(sets[name].info.truncated_responses for name in names),
        dropped=encoder.counts.dropped,
        scoring=scoring.id,
        responses={name: responses_of.id for name, responses_of in sets.items()},
        seconds=time.perf_counter() - started,
        dry_run=dry_run,
    )


@dataclass(frozen=True)
class _Models:
    teacher: Checkpoint
    reference: Checkpoint | None
    student: Checkpoint | None

    def all(self) -> list[Checkpoint]:
        return [checkpoint for checkpoint in (self.teacher, self.reference, self.student) if checkpoint is not None]

    def check_data(self, pairs: Sequence[EncodedPair], names: Sequence[ResponseName], new_tokens: int) -> None:
        longest = largest = 0
        for pair in pairs:
            lengths = {
                "chosen": len(pair.chosen_ids),
                "rejected": len(pair.rejected_ids),
                "sampled": new_tokens,
            }
            longest = max(longest, len(pair.prompt_ids) + max(lengths[name] for name in names))
            largest = max(largest, *(int(ids.max()) for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)))
        for checkpoint in self.all():
            checkpoint.check_positions(longest)
            checkpoint.check_ids(largest)

    def open_scorer(self, identity: ModelIdentity, dtype: str, device: torch.device) -> Scorer:
        checkpoint = next(checkpoint for checkpoint in self.all() if checkpoint.identity == identity)
        return HfScorer(checkpoint, dtype, device)


def _open_models(teacher: str, reference: str | None, student: str | None, top_k: int) -> _Models:
    models = _Models(
        open_checkpoint(teacher),
        open_checkpoint(reference) if reference else None,
        open_checkpoint(student) if student else None,
    )
    if models.reference is not None and models.reference.identity.digest == models.teacher.identity.digest:
        raise OptionError(
            f"--reference {reference}: it has the teacher's weights, so that every advantage would be 0",
            "name the model before preference training",
        )
    for other in models.all()[1:]:
        check_same_vocabulary(models.teacher.tokenizer, other.tokenizer, teacher, other.name)
    if top_k > models.teacher.config.vocab_size:
        raise OptionError(f"--top-k {top_k}: {teacher} has {models.teacher.config.vocab_size} tokens", "lower --top-k")
    return models


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


def _check_options(
    engine: EngineName,
    top_k: int,
    samples_per_prompt: int,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    batch_tokens: int,
) -> None:
    if engine == "vllm":
        raise OptionError("--engine vllm is not in this version", "use --engine hf")
    at_least_one = {
        "--top-k": top_k,
        "--samples-per-prompt": samples_per_prompt,
        "--max-new-tokens": max_new_tokens,
        "--batch-tokens": batch_tokens,
    }
    for option, value in at_least_one.items():
        if value < 1:
            raise OptionError(f"{option} {value}; expected at least 1")
    if temperature < 0:
        raise OptionError(f"--temperature {temperature:g}; expected 0 or more")
    if not 0 < top_p <= 1:
        raise OptionError(f"--top-p {top_p:g}; expected more than 0 and at most 1")


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
