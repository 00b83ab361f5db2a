"""What a user asks of stage one, checked as far as that needs neither a model nor a file."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adpa.data.cache.locations import Location
from adpa.data.cache.responses import RESPONSE_NAMES, ResponseName
from adpa.data.column_map import parse_map
from adpa.data.preferences import RESERVED_TEMPLATE_KWARGS
from adpa.data.sequences import check_lengths
from adpa.errors import OptionError, did_you_mean
from adpa.pipeline.models.attention import check_attention
from adpa.pipeline.option_checks import (
    SAMPLING_SEED,
    check_choices,
    check_counts,
    check_device,
    check_not_empty,
    check_shares,
    check_temperature,
)
from adpa.pipeline.options import DtypeName, EngineName
from adpa.pipeline.scoring.executor import ExecutorOptions
from adpa.pipeline.scoring.parts import Part
from adpa.pipeline.scoring.vllm_options import VllmOptions, refuse_attention

if TYPE_CHECKING:
    from adpa.data.json_rows import Rows


@dataclass(frozen=True)
class DataOptions:
    """Which pairs are read, and how they become tokens; with ``prompts_alone``, rows without responses, too."""

    source: str
    split: str | None
    limit: int | None
    map: str | None
    max_prompt_length: int
    max_length: int
    drop_invalid: bool
    chat_template_kwargs: Mapping[str, Any]
    rendered: bool
    allow_control_tokens: bool
    prompts_alone: bool

    @property
    def columns(self) -> dict[str, str]:
        """The columns of a pair that have other names in the data, with these names."""
        return parse_map(self.map)

    def read(self) -> "Rows":
        """The rows; for the errors see ``read_rows``."""
        from adpa.data.rows import read_rows  # reads Parquet, too: not for --help

        return read_rows(self.source, self.split, self.limit, self.columns, self.prompts_alone)

    def check(self) -> None:
        """Raises an ``OptionError`` for empty names, numbers out of range, a wrong map, and arguments of adpa's own."""
        check_not_empty({"--data": self.source, "--split": self.split, "--map": self.map})
        parse_map(self.map)
        check_counts({"--limit": self.limit})
        check_counts({"--max-prompt-length": self.max_prompt_length, "--max-length": self.max_length})
        check_lengths(self.max_prompt_length, self.max_length)
        if reserved := sorted(self.chat_template_kwargs.keys() & RESERVED_TEMPLATE_KWARGS):
            raise OptionError(f"--chat-template-kwargs: {reserved[0]!r} is adpa's own to decide", "leave it out")
        if self.rendered and self.chat_template_kwargs:
            raise OptionError(
                "--chat-template-kwargs with --rendered: no template renders the prompts", "leave one of them out"
            )


@dataclass(frozen=True)
class SignalOptions:
    """What is kept of the teacher's probabilities."""

    top_k: int
    top_p: float
    lossy: bool


@dataclass(frozen=True)
class SamplingOptions:
    """How the student answers."""

    samples_per_prompt: int
    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int

    def check(self) -> None:
        """Raises an ``OptionError`` for a value out of range."""
        check_counts({"--samples-per-prompt": self.samples_per_prompt, "--max-new-tokens": self.max_new_tokens})
        check_shares({"--sampling-top-p": self.top_p})
        check_temperature(self.temperature)
        SAMPLING_SEED.check("--seed", self.seed)


@dataclass(frozen=True)
class EngineOptions:
    """What runs the models, and in what steps.

    Attributes:
        name: the engine.
        vllm: options of vLLM.
        batch_tokens: tokens of a batch; by default the engine decides.
        dtype: what the models compute in.
        device: where.
        attn_implementation: what computes the attention in transformers; by default transformers decides.
        trust_remote_code: whether code from the models' repositories is run.
    """

    name: EngineName
    vllm: VllmOptions
    batch_tokens: int | None
    dtype: DtypeName
    device: str
    attn_implementation: str | None = None
    trust_remote_code: bool = False

    def check(self) -> None:
        """Raises an ``OptionError`` for a value out of range, or an attention that cannot be had."""
        check_counts({"--batch-tokens": self.batch_tokens})
        check_choices({"--engine": (self.name, EngineName), "--dtype": (self.dtype, DtypeName)})
        check_device(self.device)
        self.vllm.check()
        if self.name == "hf":
            self.vllm.check_unused("as asked")
        elif self.name == "vllm":
            refuse_attention(self.attn_implementation, "as asked")
        check_attention(self.attn_implementation)


@dataclass(frozen=True)
class Request:
    """Everything that ``precompute`` is asked for.

    Attributes:
        teacher: the large preference-aligned model.
        reference: the large model before preference training, for advantages.
        student: the model that samples, for sampled responses.
        cache: where signals are kept.
        names: the response sets to score.
        data: which pairs, and how they become tokens.
        signals: what is kept of the teacher's probabilities.
        sampling: how the student answers.
        engine: what runs the models.
        executor: in which processes.
        part: which part of the data.
        dry_run: only count.
        probe: responses that a dry run scores in memory.
    """

    teacher: str
    reference: str | None
    student: str | None
    cache: Location
    names: list[ResponseName]
    data: DataOptions
    signals: SignalOptions
    sampling: SamplingOptions
    engine: EngineOptions
    executor: ExecutorOptions
    part: Part
    dry_run: bool
    probe: int | None

    def check(self) -> None:
        """Checks the values of all options.

        Raises:
            OptionError: one is out of its range, or has no meaning beside the others.
        """
        check_not_empty({"--teacher": self.teacher, "--reference": self.reference, "--student": self.student})
        check_counts({"--top-k": self.signals.top_k, "--probe": self.probe})
        check_shares({"--top-p": self.signals.top_p})
        self.sampling.check()
        if self.probe is not None and not self.dry_run:
            raise OptionError(
                f"--probe {self.probe} without --dry-run", "a probe scores a few responses and writes nothing"
            )
        self.data.check()
        self.engine.check()
        self.executor.check(self.engine.device)


def parse_responses(responses: str | None, student: str | None) -> list[ResponseName]:
    """The response sets that ``--responses`` names, with commas; default: sampled with a student, or else the others.

    Raises:
        OptionError: there is no such set, or sampled responses and a student do not come together.
    """
    check_not_empty({"--responses": responses})
    if responses is None:
        return ["chosen", "rejected"] if student is None else ["sampled"]
    named = [name.strip().lower() for name in responses.split(",")]
    unknown = [name for name in named if name not in RESPONSE_NAMES]
    if unknown:
        raise OptionError(
            f"--responses {responses}: found {unknown[0]!r}; expected {', '.join(RESPONSE_NAMES)}",
            did_you_mean(unknown[0], RESPONSE_NAMES),
        )
    if ("sampled" in named) != (student is not None):
        raise OptionError(
            f"--responses {responses} {'without' if student is None else 'with'} --student",
            "sampled responses need the student that samples them; a student only samples",
        )
    return [name for name in RESPONSE_NAMES if name in named]
