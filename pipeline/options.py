"""Options that commands share: one type, one help text and one group for all. Imports no model library."""

from enum import StrEnum
from typing import Annotated, Literal

from typing_extensions import Doc

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
EngineName = Literal["auto", "hf", "vllm"]
HeadDtype = Literal["auto", "float32", "model"]
ModelName = Literal["teacher", "reference", "student"]


class Group(StrEnum):
    """The groups of options in a command's help: ``Annotated[type, Doc("help"), Group.TRAINING]``."""

    DECIDE = "Decide these first"
    DATA = "Data"
    SIGNALS = "Signals"
    SAMPLING = "Sampling"
    ENGINE = "Engine"
    LOSS = "Loss"
    TRAINING = "Training"
    ADAPTERS = "LoRA and QLoRA"
    MEMORY = "Memory and device"
    SAVING = "Logs, checkpoints, resuming"
    SCALE = "Beyond one process"
    DRY_RUN = "Before a run"


TeacherOption = Annotated[
    str, Doc("The large preference-aligned model: a directory, or org/name[@revision] of the Hub.")
]
SplitOption = Annotated[str | None, Doc("Split of a data set that has several.")]
MaxPromptLengthOption = Annotated[int, Doc("Tokens of a prompt that are kept, from its end.")]
DropInvalidOption = Annotated[bool, Doc("Leave out pairs that cannot be used, and count them.")]
SamplesPerPromptOption = Annotated[int, Doc("Responses sampled for each prompt.")]
TemperatureOption = Annotated[float, Doc("Sampling temperature; 0 is greedy.")]
SamplingTopPOption = Annotated[float, Doc("Nucleus of the sampling distribution.")]
MaxNewTokensOption = Annotated[int, Doc("Tokens of a sampled response at most.")]
SamplingSeedOption = Annotated[int, Doc("Seed of the sampling.")]
EngineOption = Annotated[
    EngineName,
    Doc("What runs the models: vllm, hf (transformers), or auto: vllm where it is installed and there is a GPU."),
]
TensorParallelOption = Annotated[int, Doc("vLLM: GPUs that share the teacher, and the reference.")]
QuantizationOption = Annotated[str | None, Doc("vLLM: how to quantize teacher and reference, such as fp8.")]
GpuMemoryUtilizationOption = Annotated[float, Doc("vLLM: share of a GPU's memory that it may take.")]
EngineArgOption = Annotated[
    list[str] | None,
    Doc("vLLM: key=value of any engine argument, for one model with teacher:, reference: or student:; repeatable."),
]
BatchTokensOption = Annotated[
    int | None,
    Doc(
        "Tokens of a batch, which becomes a file. Default: 262144 with vLLM; with hf what the GPU's free memory has "
        "room for, or 8192 on a CPU."
    ),
]
DtypeOption = Annotated[DtypeName, Doc("Dtype to compute in; auto is the checkpoint's own.")]
DeviceOption = Annotated[str, Doc("cpu, cuda, cuda:1, …; auto is a GPU where there is one.")]
