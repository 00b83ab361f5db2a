"""What a user asks of stage one, checked as far as that needs neither a model nor a file."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adpa.data.cache.locations import Location
from adpa.data.cache.responses import RESPONSE_NAMES, ResponseName
from adpa.data.preferences import RESERVED_TEMPLATE_KWARGS
from adpa.data.sequences import check_lengths
from adpa.errors import OptionError
from adpa.pipeline.options import DtypeName, EngineName
from adpa.pipeline.scoring.executor import ExecutorOptions
from adpa.pipeline.scoring.parts import Part
from adpa.pipeline.scoring.vllm_options import VllmOptions


@dataclass(frozen=True)
class DataOptions:
    """Which pairs are read, and how they become tokens."""

    source: str
    split: str | None
    max_prompt_length: int
    max_length: int
    drop_invalid: bool
    chat_template_kwargs: Mapping[str, Any]
    rendered: bool
    allow_control_tokens: bool

    def check(self) -> None:
        """Raises an ``OptionError`` for lengths out of range, and for arguments that no chat template gets."""
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
        _check_at_least_one({"--samples-per-prompt": self.samples_per_prompt, "--max-new-tokens": self.max_new_tokens})
        _check_probabilities({"--sampling-top-p": self.top_p})
        if self.temperature < 0:
            raise OptionError(f"--temperature {self.temperature:g}; expected 0 or more")


@dataclass(frozen=True)
class EngineOptions:
    """What runs the models, and in what steps.

    Attributes:
        name: the engine.
        vllm: options of vLLM.
        batch_tokens: tokens of a batch; by default the engine decides.
        dtype: what the models compute in.
        device: where.
    """

    name: EngineName
    vllm: VllmOptions
    batch_tokens: int | None
    dtype: DtypeName
    device: str

    def check(self) -> None:
        """Raises an ``OptionError`` for a value out of range."""
        _check_at_least_one({"--batch-tokens": self.batch_tokens})
        self.vllm.check()


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
        _check_at_least_one({"--top-k": self.signals.top_k, "--probe": self.probe})
        _check_probabilities({"--top-p": self.signals.top_p})
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
    if responses is None:
        return ["sampled"] if student else ["chosen", "rejected"]
    named = [name.strip().lower() for name in responses.split(",")]
    unknown = [name for name in named if name not in RESPONSE_NAMES]
    if unknown:
        raise OptionError(f"--responses {responses}: found {unknown[0]!r}; expected {', '.join(RESPONSE_NAMES)}")
    if ("sampled" in named) != (student is not None):
        raise OptionError(
            f"--responses {responses} {'without' if student is None else 'with'} --student",
            "sampled responses need the student that samples them; a student only samples",
        )
    return [name for name in RESPONSE_NAMES if name in named]


def _check_at_least_one(options: Mapping[str, int | None]) -> None:
    for option, value in options.items():
        if value is not None and value < 1:
            raise OptionError(f"{option} {value}; expected at least 1")


def _check_probabilities(options: Mapping[str, float]) -> None:
    for option, value in options.items():
        if not 0 < value <= 1:
            raise OptionError(f"{option} {value:g}; expected more than 0 and at most 1")
