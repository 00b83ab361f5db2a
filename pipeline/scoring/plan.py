"""From a request to the work of a run: the models, opened and checked; the data, read; the settings that name rows."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from adpa.data.cache.responses import ResponseName, ResponseSet, ResponseSetInfo, Sampling, make_response_set
from adpa.data.cache.samples import SampleRequest
from adpa.data.cache.set_records import SetRecord, make_record
from adpa.data.cache.signals import Scoring
from adpa.data.chat_template import ChatTemplate
from adpa.data.column_map import describe_map
from adpa.data.encoding import EncodedPair, Encoder
from adpa.data.sequences import TokenIds, TokenSequence
from adpa.data.vocabulary import digest_tokenizer
from adpa.errors import OptionError
from adpa.pipeline.models.checkpoint import Checkpoint
from adpa.pipeline.models.devices import resolve_device
from adpa.pipeline.scoring.engine import Engine, choose_engine
from adpa.pipeline.scoring.jobs import make_batches
from adpa.pipeline.scoring.opened_models import Models, open_models
from adpa.pipeline.scoring.parts import PartPrompts
from adpa.pipeline.scoring.request import Request
from adpa.pipeline.scoring.sample import sampling_batches


@dataclass(frozen=True)
class Setup:
    """The models of a run and what runs them.

    Attributes:
        models: the models.
        engine: what runs them.
        scoring_tokens: tokens of a batch that is scored.
        sampling_tokens: tokens of a batch that is sampled; 0 without a student.
    """

    models: Models
    engine: Engine
    scoring_tokens: int
    sampling_tokens: int


@dataclass(frozen=True)
class Pairs:
    """The data of a run.

    Attributes:
        encoder: the encoder that has read the data, with its counts.
        record: where the data came from.
        encoded: the pairs, at least one.
    """

    encoder: Encoder
    record: SetRecord
    encoded: Sequence[EncodedPair]


@dataclass(frozen=True)
class Plan:
    """What a run samples and scores, unless the cache has it.

    Attributes:
        encoder: the encoder that has read the data, with its counts.
        names: the response sets to score.
        info: how the response sets are made, but for their names and rows.
        record: the record of the data.
        sets: the chosen responses, which every objective needs, and the rejected ones if they are scored; none of
            prompts alone.
        own: the prompts of the run's part of the data.
        scoring: who judges, and how.
        sampling: how the student answers; none without a student.
        samples: a response to sample and the id of its example, for all the data.
        longest: tokens that a sequence can have.
        first: the first pair of the data.
    """

    encoder: Encoder
    names: Sequence[ResponseName]
    info: ResponseSetInfo
    record: SetRecord
    sets: Mapping[ResponseName, ResponseSet]
    own: PartPrompts
    scoring: Scoring
    sampling: Sampling | None
    samples: Sequence[tuple[str, SampleRequest]]
    longest: int
    first: EncodedPair

    @property
    def compares_responses(self) -> bool:
        """Whether both responses of the pairs are scored by teacher and reference."""
        return self.scoring.reference is not None and {"chosen", "rejected"}.issubset(self.names)

    def own_samples(self) -> list[SampleRequest]:
        """The responses to sample for the part."""
        return [sample for _, sample in self.samples if sample.prompt_ids in self.own]

    def sampled_set(self, answers: Mapping[bytes, TokenIds]) -> ResponseSet:
        """The set of the responses that are sampled already, by the keys of their requests."""
        rows = [(example, one.prompt_ids, answers[one.key]) for example, one in self.samples if one.key in answers]
        return make_response_set(replace(self.info, name="sampled", sampling=self.sampling), rows, self.record)

    def sequences(self, sets: Mapping[ResponseName, ResponseSet]) -> list[TokenSequence]:
        """The distinct sequences of some sets that the part scores."""
        sequences = (sequence for name in self.names if name in sets for sequence in sets[name].sequences())
        return list({one.key: one for one in sequences if one.prompt_ids in self.own}.values())


def open_setup(request: Request) -> Setup:
    """Opens the models and chooses their engine; no weights are loaded.

    Raises:
        AdpaError: a model is not there, does not fit the teacher or the memory, or the engine cannot run it.
    """
    options = request.engine
    device = resolve_device(options.device)
    models = open_models(
        request.teacher,
        request.reference,
        request.student,
        request.signals.top_k,
        attn_implementation=options.attn_implementation,
        trust_remote_code=options.trust_remote_code,
    )
    dtypes = models.dtypes(options.dtype)
    engine = choose_engine(options.name, options.vllm, device, models.by_name(), dtypes)
    models.check_reference()
    return _make_setup(request, models, engine)


def with_student(request: Request, setup: Setup, name: str) -> Setup:
    """The same teacher, reference and engine with another student; no weights are loaded.

    Raises:
        AdpaError: the student is not there, does not fit the teacher or the memory, or the engine cannot run it.
    """
    options, models = request.engine, setup.models.with_student(name)
    assert models.student is not None
    device, dtypes = resolve_device(options.device), models.dtypes(options.dtype)
    choose_engine(options.name, options.vllm, device, {"student": models.student}, dtypes)  # for its checks
    return _make_setup(request, models, setup.engine)


def _make_setup(request: Request, models: Models, engine: Engine) -> Setup:
    options, dtypes = request.engine, models.dtypes(request.engine.dtype)
    scoring_tokens = options.batch_tokens or engine.scoring_tokens(models.by_name(), dtypes)
    sampling_tokens = 0
    if models.student is not None:
        sampling_tokens = options.batch_tokens or engine.sampling_tokens(
            models.student, dtypes["student"], request.sampling.max_new_tokens, request.sampling.top_p
        )
    return Setup(models, engine, scoring_tokens, sampling_tokens)


def make_plan(request: Request, setup: Setup) -> Plan:
    """Reads the data and plans the work.

    Raises:
        AdpaError: the data cannot be read, the models cannot read it, or it is too little for the parts or workers.
    """
    return plan_pairs(request, setup, read_pairs(request, setup))


def read_pairs(request: Request, setup: Setup) -> Pairs:
    """Reads the data and turns it into tokens.

    Raises:
        AdpaError: the data cannot be read, or has no pair that can be used.
    """
    data = request.data
    encoder = _open_encoder(request, setup.models.teacher)
    place = os.path.abspath(data.source) if os.path.exists(data.source) else data.source
    record = make_record(place, data.split, data.limit, describe_map(data.columns))
    pairs = list(encoder.encode(data.read()))
    if not pairs:
        raise encoder.counts.nothing_left(data.source)
    return Pairs(encoder, record, pairs)


def plan_pairs(request: Request, setup: Setup, data: Pairs) -> Plan:
    """Plans the work on pairs.

    Raises:
        AdpaError: the models cannot read the pairs, or they are too few for the parts or workers.
    """
    models, pairs, encoder = setup.models, data.encoded, data.encoder
    longest = models.check_data(pairs, request.names, request.sampling.max_new_tokens, setup.engine)
    samples_per_prompt = request.sampling.samples_per_prompt if models.student else 0
    info = _set_info(encoder)
    sets = _preference_sets(pairs, info, request.names, data.record)
    plan = Plan(
        encoder=encoder,
        names=request.names,
        info=info,
        record=data.record,
        sets=sets,
        own=PartPrompts(request.part, (pair.prompt_ids for pair in pairs)),
        scoring=_scoring(request, setup, info.vocabulary),
        sampling=_sampling(request, setup, encoder.template.turn_end.token_id),
        samples=[
            (pair.example_id, SampleRequest(pair.prompt_ids, index))
            for pair in pairs
            for index in range(samples_per_prompt)
        ],
        longest=longest,
        first=pairs[0],
    )
    scored = make_batches(plan.sequences(sets), len, setup.scoring_tokens)
    sampled = sampling_batches(plan.own_samples(), request.sampling.max_new_tokens, setup.sampling_tokens)
    request.executor.check_batches(max(len(scored), len(sampled)))
    return plan


def _open_encoder(request: Request, teacher: Checkpoint) -> Encoder:
    data = request.data
    template = ChatTemplate(teacher.tokenizer, data.chat_template_kwargs, teacher.eos_token_ids)
    for name in data.chat_template_kwargs:
        if not template.takes_argument(name):
            raise OptionError(
                f"--chat-template-kwargs: the chat template of {teacher.name} takes no {name!r}", "check the name"
            )
    return Encoder(
        template,
        data.max_prompt_length,
        data.max_length,
        drop_invalid=data.drop_invalid,
        rendered=data.rendered,
        allow_control_tokens=data.allow_control_tokens,
        prompts_alone=data.prompts_alone,
    )


def _set_info(encoder: Encoder) -> ResponseSetInfo:
    """How response sets are made of what an encoder has read."""
    digests = digest_tokenizer(encoder.template.tokenizer)
    return ResponseSetInfo(
        name="chosen",
        tokenizer=digests.tokenizer,
        vocabulary=digests.vocabulary,
        chat_template=digests.chat_template,
        turn_end=encoder.template.turn_end.token_id,
        max_prompt_length=encoder.max_prompt_length,
        max_length=encoder.max_length,
        truncated_prompts=encoder.counts.truncated_prompts,
        dropped=encoder.counts.dropped,
        chat_template_kwargs=encoder.template.arguments,
        rendered=encoder.rendered,
    )


def _preference_sets(
    pairs: Sequence[EncodedPair], info: ResponseSetInfo, names: Sequence[ResponseName], record: SetRecord
) -> dict[ResponseName, ResponseSet]:
    if not pairs[0].chosen_ids.size:  # prompts alone
        return {}
    chosen = [(pair.example_id, pair.prompt_ids, pair.chosen_ids) for pair in pairs]
    sets: dict[ResponseName, ResponseSet] = {"chosen": make_response_set(info, chosen, record)}
    if "rejected" in names:
        rejected = [(pair.example_id, pair.prompt_ids, pair.rejected_ids) for pair in pairs]
        sets["rejected"] = make_response_set(replace(info, name="rejected"), rejected, record)
    return sets


def _scoring(request: Request, setup: Setup, vocabulary: str) -> Scoring:
    models = setup.models
    return Scoring(
        teacher=models.teacher.identity,
        reference=models.reference.identity if models.reference else None,
        vocabulary=vocabulary,
        top_k=request.signals.top_k,
        dtype=models.dtypes(request.engine.dtype)["teacher"],
        engine=setup.engine.name,
        top_p=request.signals.top_p,
        lossy=request.signals.lossy,
    )


def _sampling(request: Request, setup: Setup, turn_end: int) -> Sampling | None:
    models, options = setup.models, request.sampling
    if models.student is None:
        return None
    return Sampling(
        student=models.student.identity.digest,
        turn_end=turn_end,
        temperature=options.temperature,
        top_p=options.top_p,
        max_new_tokens=options.max_new_tokens,
        samples_per_prompt=options.samples_per_prompt,
        seed=options.seed,
        dtype=models.dtypes(request.engine.dtype)["student"],
        engine=setup.engine.sampling_name,
        stops=tuple(sorted(set(models.student.eos_token_ids) - {turn_end})),
    )
