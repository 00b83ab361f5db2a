"""What runs the models of stage one: transformers, or vLLM. Both give the same signals."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Protocol

import torch

from adpa.data.cache.responses import Sampling
from adpa.data.cache.signals import Scoring
from adpa.errors import OptionError
from adpa.pipeline.models.batch_memory import FIXED_TOKENS, free_memory, sampling_tokens, scoring_tokens
from adpa.pipeline.models.checkpoint import Checkpoint, device_memory
from adpa.pipeline.options import EngineName
from adpa.pipeline.scoring.hf_sampler import HfSampler
from adpa.pipeline.scoring.hf_scorer import open_hf_scorer
from adpa.pipeline.scoring.sample import Sampler
from adpa.pipeline.scoring.score import Scorer
from adpa.pipeline.scoring.vllm_engine import obstacle_to_vllm, open_vllm
from adpa.pipeline.scoring.vllm_options import Role, VllmOptions


class Engine(Protocol):
    """Opens scorers and samplers."""

    @property
    def name(self) -> str:
        """What a scoring says of it: every setting that can change a number."""
        ...

    @property
    def sampling_name(self) -> str:
        """What a sampling says of it."""
        ...

    @property
    def reason(self) -> str:
        """Why it is this one, for the report."""
        ...

    def scoring_tokens(self, models: Mapping[Role, Checkpoint], dtypes: Mapping[Role, str]) -> int:
        """Tokens of a batch that each of some models scores, unless the user says how many."""
        ...

    def sampling_tokens(self, checkpoint: Checkpoint, dtype: str, max_new_tokens: int, top_p: float) -> int:
        """Tokens of a batch of sampling, prompts and responses, unless the user says how many."""
        ...

    @property
    def max_tokens(self) -> int | None:
        """Tokens of a sequence at most, where the user sets a limit."""
        ...

    @property
    def extra_positions(self) -> int:
        """Positions that scoring a sequence takes beside one for each of its tokens."""
        ...

    @property
    def pads(self) -> bool:
        """Whether every sequence of a batch costs as much as its longest one."""
        ...

    @property
    def gpus(self) -> int:
        """GPUs that its largest model takes; 0 where it computes on the CPU."""
        ...

    def open_scorer(self, checkpoint: Checkpoint, scoring: Scoring, longest: int) -> Scorer:
        """Loads a model of a scoring, or the student beside it, for sequences of up to so many tokens."""
        ...

    def open_sampler(self, checkpoint: Checkpoint, sampling: Sampling, longest: int) -> Sampler:
        """Loads a student, for prompts and responses of up to so many tokens together."""
        ...


@dataclass(frozen=True)
class HfEngine:
    """Runs the models with transformers on one device."""

    device: torch.device
    reason: str

    name = sampling_name = "hf"
    max_tokens = None
    extra_positions = 0
    pads = True

    @property
    def gpus(self) -> int:
        """See ``Engine.gpus``."""
        return int(self.device.type == "cuda")

    def scoring_tokens(self, models: Mapping[Role, Checkpoint], dtypes: Mapping[Role, str]) -> int:
        """See ``Engine.scoring_tokens``. By a GPU's free memory; Ray's workers are assumed to have the same GPU."""
        if self.device.type != "cuda":
            return FIXED_TOKENS
        free = free_memory(self.device)
        return min(scoring_tokens(checkpoint, dtypes[role], free) for role, checkpoint in models.items())

    def sampling_tokens(self, checkpoint: Checkpoint, dtype: str, max_new_tokens: int, top_p: float) -> int:
        """See ``Engine.sampling_tokens``. By a GPU's free memory; Ray's workers are assumed to have the same GPU."""
        if self.device.type != "cuda":
            return FIXED_TOKENS
        return sampling_tokens(checkpoint, dtype, free_memory(self.device), max_new_tokens, top_p)

    def open_scorer(self, checkpoint: Checkpoint, scoring: Scoring, longest: int) -> Scorer:
        """See ``Engine.open_scorer``."""
        return open_hf_scorer(checkpoint, scoring.dtype, self.device)

    def open_sampler(self, checkpoint: Checkpoint, sampling: Sampling, longest: int) -> Sampler:
        """See ``Engine.open_sampler``."""
        return HfSampler(checkpoint, sampling, self.device)


def choose_engine(
    name: EngineName,
    options: VllmOptions,
    device: torch.device,
    models: Mapping[Role, Checkpoint],
    dtypes: Mapping[Role, str],
) -> Engine:
    """The engine of a name, after checking that it can hold the models; ``auto`` is vLLM where it runs on a GPU.

    Raises:
        OptionError: the engine cannot be used, or not with these options.
        ModelError: a model's weights do not fit into memory.
    """
    options.check()
    reason = "as asked"
    if name == "auto":
        obstacle = "there is no GPU" if device.type != "cuda" else obstacle_to_vllm(device)
        name, reason = ("hf", obstacle) if obstacle else ("vllm", "a GPU and vLLM are there")
    if name == "vllm":
        return open_vllm(options, device, models, dtypes, reason)
    for option, value in asdict(options).items():
        if value != getattr(VllmOptions(), option):
            flag = option.replace("_", "-")
            raise OptionError(f"--{flag} is for vLLM; the engine is hf ({reason})", "leave it out")
    for role, checkpoint in models.items():
        advice = "use --engine vllm with --tensor-parallel or --quantization, or another --dtype"
        checkpoint.check_memory(dtypes[role], device_memory(device), advice)
    return HfEngine(device, reason)
