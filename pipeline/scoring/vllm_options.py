"""What a user says about vLLM: options, and arguments of vLLM's own engine."""

import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

from adpa.errors import OptionError

if TYPE_CHECKING:
    import torch

HeadDtype = Literal["auto", "float32", "model"]
Role = Literal["teacher", "reference", "student"]

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
NUMBERS = ("tensor_parallel_size", "pipeline_parallel_size", "gpu_memory_utilization", "cpu_offload_gb")


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
        for _, key, value in self._engine_args:
            if key in OWN_ARGUMENTS:
                raise OptionError(f"--engine-arg {key}: adpa sets it", "leave it out; --max-model-len is an option")
            if key in NUMBERS and not isinstance(value, int | float):
                raise OptionError(f"--engine-arg {key}: found {value!r}; expected a number")
            if key == "hf_overrides" and not isinstance(value, dict):
                raise OptionError(f"--engine-arg {key}: found {value!r}; expected a JSON object")
            if key == "hf_overrides" and "head_dtype" in value:
                raise OptionError("--engine-arg hf_overrides: found head_dtype", "use --head-dtype")

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

    def memory(self, role: Role, device: "torch.device") -> int:
        """Bytes that the weights of a model may take at most."""
        from adpa.pipeline.models.checkpoint import device_memory  # torch: options are checked before it is imported

        arguments = self.arguments(role)
        share = device_memory(device) * arguments["gpu_memory_utilization"]
        room = int(self.gpus(role) * (share + arguments.get("cpu_offload_gb", 0) * 2**30))
        # vLLM quantizes weights as it loads them, to four bits at least.
        return 4 * room if "quantization" in arguments else room

    def gpus(self, role: Role) -> int:
        """GPUs that a model is spread over."""
        arguments = self.arguments(role)
        return int(arguments.get("tensor_parallel_size", 1) * arguments.get("pipeline_parallel_size", 1))

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
