"""Chooses the engine of stage one, transformers or vLLM, and defines what an engine must do.

Both engines give the same signals.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from adpa.data.cache.responses import Sampling
from adpa.data.cache.signals import Scoring
from adpa.pipeline.models.attention import check_place
from adpa.pipeline.models.batch_memory import FIXED_TOKENS, free_memory, sampling_tokens, scoring_tokens
from adpa.pipeline.models.checkpoint import Checkpoint
from adpa.pipeline.models.devices import device_memory
from adpa.pipeline.options import EngineName, ModelName
from adpa.pipeline.scoring.hf_sampler import HfSampler
from adpa.pipeline.scoring.hf_scorer import open_hf_scorer
from adpa.pipeline.scoring.sample import SharedSampler
from adpa.pipeline.scoring.score import Scorer
from adpa.pipeline.scoring.vllm_engine import obstacle_to_vllm, open_vllm
from adpa.pipeline.scoring.vllm_options import VllmOptions, refuse_attention


class Engine(Protocol):
    """Opens scorers and samplers."""

    @property
    def name(self) -> str:
        """The engine's entry in a scoring: every setting that can change a number by more than its last digits.

        The attention of transformers is none: like the device and the batch, it changes the order of sums.
        """
        ...

    @property
    def sampling_name(self) -> str:
        """The engine's entry in a sampling: every setting that can change a number."""
        ...

    @property
    def student_name(self) -> str:
        """The engine's entry in a scoring by a student: every setting that can change a number."""
        ...

    @property
    def reason(self) -> str:
        """Why this engine was chosen, for the report."""
        ...

    def scoring_tokens(self, models: Mapping[ModelName, Checkpoint], dtypes: Mapping[ModelName, str]) -> int:
        """Default tokens of a scoring batch, small enough for each of these models."""
        ...

    def sampling_tokens(self, checkpoint: Checkpoint, dtype: str, max_new_tokens: int, top_p: float) -> int:
        """Default tokens of a sampling batch, prompts and responses together."""
        ...

    @property
    def max_tokens(self) -> int | None:
        """The user's limit on the tokens of a sequence; None without a limit."""
        ...

    @property
    def extra_positions(self) -> int:
        """Positions that scoring needs in addition to one for each token of a sequence."""
        ...

    @property
    def pads(self) -> bool:
        """Whether every sequence of a batch takes as much time as the longest one."""
        ...

    @property
    def gpus(self) -> int:
        """GPUs that the largest model takes; 0 on a CPU."""
        ...

    def open_scorer(self, checkpoint: Checkpoint, scoring: Scoring, longest: int) -> Scorer:
        """Loads the teacher, the reference or the student for sequences of up to ``longest`` tokens."""
        ...

    def open_sampler(self, checkpoint: Checkpoint, sampling: Sampling, longest: int) -> SharedSampler:
        """Loads a student for prompts and responses of up to ``longest`` tokens together."""
        ...


@dataclass(frozen=True)
class HfEngine:
    """Runs the models with transformers on one device."""

    device: torch.device
    reason: str

    name = sampling_name = student_name = "hf"
    max_tokens = None
    extra_positions = 0
    pads = True

    @property
    def gpus(self) -> int:
        """See ``Engine.gpus``."""
        return int(self.device.type == "cuda")

    def scoring_tokens(self, models: Mapping[ModelName, Checkpoint], dtypes: Mapping[ModelName, str]) -> int:
        """See ``Engine.scoring_tokens``. Depends on the GPU's free memory; Ray's workers must have the same GPU."""
        if self.device.type != "cuda":
            return FIXED_TOKENS
        free = free_memory(self.device)
        return min(scoring_tokens(checkpoint, dtypes[model], free) for model, checkpoint in models.items())

    def sampling_tokens(self, checkpoint: Checkpoint, dtype: str, max_new_tokens: int, top_p: float) -> int:
        """See ``Engine.sampling_tokens``. Depends on the GPU's free memory; Ray's workers must have the same GPU."""
        if self.device.type != "cuda":
            return FIXED_TOKENS
        return sampling_tokens(checkpoint, dtype, free_memory(self.device), max_new_tokens, top_p)

    def open_scorer(self, checkpoint: Checkpoint, scoring: Scoring, longest: int) -> Scorer:
        """See ``Engine.open_scorer``."""
        return open_hf_scorer(checkpoint, scoring.dtype, self.device)

    def open_sampler(self, checkpoint: Checkpoint, sampling: Sampling, longest: int) -> SharedSampler:
        """See ``Engine.open_sampler``."""
        return HfSampler(checkpoint, sampling, self.device)


def choose_engine(
    name: EngineName,
    options: VllmOptions,
    device: torch.device,
    models: Mapping[ModelName, Checkpoint],
    dtypes: Mapping[ModelName, str],
) -> Engine:
    """Chooses the engine and checks that the models fit into memory. ``auto`` means vLLM if it can run on a GPU here.

    Raises:
        OptionError: the engine is not available, or does not take these options.
        ModelError: a model's weights do not fit into memory.
    """
    options.check()
    reason = "as asked"
    if name == "auto":
        obstacle = "there is no GPU" if device.type != "cuda" else obstacle_to_vllm(device)
        name, reason = ("hf", obstacle) if obstacle else ("vllm", "a GPU and vLLM are there")
    attention = next((each.attn_implementation for each in models.values()), None)  # all have the same
    if name == "vllm":
        refuse_attention(attention, reason)
        return open_vllm(options, device, models, dtypes, reason)
    options.check_unused(reason)
    for model, checkpoint in models.items():
        advice = "use --engine vllm with --tensor-parallel or --quantization, or another --dtype"
        check_place(attention, device.type, dtypes[model])
        checkpoint.check_memory(dtypes[model], device_memory(device), advice)
    return HfEngine(device, reason)
