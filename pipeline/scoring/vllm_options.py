"""The user's options for vLLM, checked without importing torch or vLLM."""

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, get_args

from adpa.errors import OptionError
from adpa.pipeline.option_checks import check_choices, check_counts, check_not_empty, check_shares
from adpa.pipeline.options import HeadDtype, ModelName

# adpa sets the first group itself. The second would load something else than the files that are digested. The third
# changes only speed and memory. Any other argument may change a number, so that it is part of a scoring's identity.
OWN_ARGUMENTS = {
    *("model", "tokenizer", "skip_tokenizer_init", "runner", "convert", "pooler_config", "dtype", "max_model_len"),
    *("max_logprobs", "logprobs_mode", "enable_prefix_caching", "generation_config", "data_parallel_size"),
    *("speculative_config", "kv_sharing_fast_prefill", "disable_log_stats"),
}
OTHER_FILES = {
    *("config_format", "hf_config_path", "model_weights"),
    *("revision", "code_revision", "tokenizer_revision", "hf_token", "default_mm_loras"),
    *("spec_method", "spec_model", "spec_tokens"),
}
SAME_FILES = ("hf", "safetensors", "fastsafetensors", "instanttensor")  # load formats for the files that are digested
PLACEMENT_ARGUMENTS = {
    *("tensor_parallel_size", "pipeline_parallel_size", "enable_expert_parallel", "distributed_executor_backend"),
    *("gpu_memory_utilization", "kv_cache_memory_bytes", "cpu_offload_gb", "block_size"),
    *("max_num_batched_tokens", "max_num_seqs", "enable_chunked_prefill", "async_scheduling", "enforce_eager"),
    *("compilation_config", "disable_custom_all_reduce", "max_parallel_loading_workers"),
}
NUMBERS = ("tensor_parallel_size", "pipeline_parallel_size", "gpu_memory_utilization", "cpu_offload_gb")


@dataclass(frozen=True)
class VllmOptions:
    """The options of vLLM, with the defaults of ``precompute``."""

    tensor_parallel: int = 1
    quantization: str | None = None
    max_model_len: int | None = None
    gpu_memory_utilization: float = 0.9
    head_dtype: HeadDtype = "auto"
    engine_arg: tuple[str, ...] = ()

    def check(self) -> None:
        """Checks the values as far as possible without vLLM.

        Raises:
            OptionError: a value is out of range or has the wrong type, or adpa sets this argument itself.
        """
        check_counts({"--tensor-parallel": self.tensor_parallel, "--max-model-len": self.max_model_len})
        check_shares({"--gpu-memory-utilization": self.gpu_memory_utilization})
        check_choices({"--head-dtype": (self.head_dtype, HeadDtype)})
        check_not_empty({"--quantization": self.quantization})
        for _, key, value in self._engine_args:
            if key in OWN_ARGUMENTS:
                raise OptionError(f"--engine-arg {key}: adpa sets it", "leave it out; --max-model-len is an option")
            if key == "trust_remote_code":
                raise OptionError(f"--engine-arg {key}: adpa sets it", "use --trust-remote-code")
            if key in OTHER_FILES or (key == "load_format" and value not in SAME_FILES):
                raise OptionError(
                    f"--engine-arg {key}: vLLM would load something else than the files of the model that adpa knows",
                    f"leave it out; load_format may be one of {', '.join(SAME_FILES)}",
                )
            if key in NUMBERS and not isinstance(value, int | float):
                raise OptionError(f"--engine-arg {key}: found {value!r}; expected a number")
            if key == "hf_overrides" and not isinstance(value, dict):
                raise OptionError(f"--engine-arg {key}: found {value!r}; expected a JSON object")
            if key == "hf_overrides" and "quantization_config_file" in value:
                fix = "give its content as quantization_config_dict_json"
                raise OptionError("--engine-arg hf_overrides: found quantization_config_file", fix)
            if key == "hf_overrides" and "head_dtype" in value:
                raise OptionError("--engine-arg hf_overrides: found head_dtype", "use --head-dtype")

    def check_unused(self, reason: str) -> None:
        """Checks that no option is set, because the engine is hf for this reason.

        Raises:
            OptionError: one is.
        """
        for option, value in asdict(self).items():
            if value != getattr(VllmOptions(), option):
                flag = option.replace("_", "-")
                raise OptionError(f"--{flag} is for vLLM; the engine is hf ({reason})", "leave it out")

    def arguments(self, model: ModelName) -> dict[str, Any]:
        """The engine arguments of a model. Only teacher and reference get tensor parallelism and quantization."""
        arguments: dict[str, Any] = {"gpu_memory_utilization": self.gpu_memory_utilization}
        if model != "student":
            arguments["tensor_parallel_size"] = self.tensor_parallel
            if self.quantization is not None:
                arguments["quantization"] = self.quantization
        for owner in (None, model):  # an argument of one model overrides the argument of all models
            arguments |= {key: value for target, key, value in self._engine_args if target == owner}
        return arguments

    def gpus(self, model: ModelName) -> int:
        """Number of GPUs that a model runs on."""
        arguments = self.arguments(model)
        return int(arguments.get("tensor_parallel_size", 1) * arguments.get("pipeline_parallel_size", 1))

    def numerics(self, model: ModelName) -> list[str]:
        """The engine arguments of a model that may change a number, as ``model:key=value``."""
        return [
            f"{model}:{key}={json.dumps(value, sort_keys=True)}"
            for key, value in sorted(self.arguments(model).items())
            if key not in PLACEMENT_ARGUMENTS
        ]

    @cached_property
    def _engine_args(self) -> list[tuple[str | None, str, Any]]:
        """Model (None for all models), key and value of each ``--engine-arg``."""
        return [_parse_engine_arg(text) for text in self.engine_arg]


def refuse_attention(attn_implementation: str | None, reason: str) -> None:
    """Checks that no attention of transformers is asked for, because the engine is vLLM for this reason.

    Raises:
        OptionError: one is.
    """
    if attn_implementation is not None:
        raise OptionError(
            f"--attn-implementation {attn_implementation} is for transformers; the engine is vllm ({reason})",
            "use --engine hf, or vLLM's own: --engine-arg attention_backend=FLASH_ATTN",
        )


def _parse_engine_arg(text: str) -> tuple[str | None, str, Any]:
    """Parses ``[model:]key=value``. A value that is not JSON stays text."""
    name, equals, literal = text.partition("=")
    model, colon, key = name.rpartition(":")
    if not (equals and key) or (colon and model not in get_args(ModelName)):
        raise OptionError(f"--engine-arg {text}; expected key=value, or {'|'.join(get_args(ModelName))}:key=value")
    try:
        value = json.loads(literal)
    except json.JSONDecodeError:
        value = literal
    return model or None, key.replace("-", "_"), value
