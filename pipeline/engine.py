"""What runs the models of stage one: transformers, or vLLM. Both give the same signals."""

from dataclasses import asdict, dataclass
from typing import Literal, Protocol

import torch

from adpa.data.responses import Sampling
from adpa.data.signals import Scoring
from adpa.errors import ModelError, OptionError
from adpa.pipeline.checkpoint import Checkpoint, device_memory
from adpa.pipeline.engine_vllm import Role, VllmOptions, installed_vllm, open_vllm
from adpa.pipeline.sampler_hf import HfSampler
from adpa.pipeline.sampling import Sampler
from adpa.pipeline.scorer_hf import open_hf_scorer
from adpa.pipeline.scoring import Scorer

EngineName = Literal["auto", "hf", "vllm"]


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

    @property
    def batch_tokens(self) -> int:
        """Tokens of a batch, unless the user says how many."""
        ...

    @property
    def max_tokens(self) -> int | None:
        """Tokens of a sequence at most, where the user sets a limit."""
        ...

    def memory(self, role: Role) -> int:
        """Bytes that the weights of a model in this role may take at most."""
        ...

    @property
    def memory_advice(self) -> str:
        """What to do about a model that takes more."""
        ...

    def open_scorer(self, checkpoint: Checkpoint, scoring: Scoring, longest: int) -> Scorer:
        """Loads a model of a scoring, for sequences of up to so many tokens."""
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
    batch_tokens = 8192
    max_tokens = None
    memory_advice = "use --engine vllm with --tensor-parallel or --quantization, or another --dtype"

    def memory(self, role: Role) -> int:
        """See ``Engine.memory``."""
        return device_memory(self.device)

    def open_scorer(self, checkpoint: Checkpoint, scoring: Scoring, longest: int) -> Scorer:
        """See ``Engine.open_scorer``."""
        return open_hf_scorer(checkpoint, scoring.dtype, self.device)

    def open_sampler(self, checkpoint: Checkpoint, sampling: Sampling, longest: int) -> Sampler:
        """See ``Engine.open_sampler``."""
        return HfSampler(checkpoint, sampling, self.device)


def choose_engine(
    name: EngineName, options: VllmOptions, device: torch.device, teacher: Checkpoint, reference: Checkpoint | None
) -> Engine:
    """The engine of a name; ``auto`` is vLLM where it is installed and there is a GPU.

    Raises:
        OptionError: the engine cannot be used, or not with these options.
    """
    options.check()
    reason = "as asked"
    if name == "auto":
        name, reason = "vllm", "a GPU and vLLM are there"
        if device.type != "cuda":
            name, reason = "hf", "there is no GPU"
        elif installed_vllm() is None:
            name, reason = "hf", "vLLM is not installed"
    if name == "vllm":
        return open_vllm(options, device, teacher, reference, reason)
    for option, value in asdict(options).items():
        if value != getattr(VllmOptions(), option):
            flag = option.replace("_", "-")
            raise OptionError(f"--{flag} is for vLLM; the engine is hf ({reason})", "leave it out")
    return HfEngine(device, reason)


def check_fits(engine: Engine, role: Role, checkpoint: Checkpoint, dtype: str) -> None:
    """Checks that a model's weights fit into memory, by their size on disk.

    Raises:
        ModelError: they do not.
    """
    needed = checkpoint.weight_bytes(dtype)
    if needed > (room := engine.memory(role)):
        raise ModelError(
            f"{checkpoint.name}: its weights take about {needed / 1e9:.1f} GB in {dtype}; "
            f"there is room for {room / 1e9:.1f} GB",
            engine.memory_advice,
        )
