"""Options that commands share: one type, one help text and one group for all. Imports no model library."""

import inspect
from collections.abc import Mapping
from enum import StrEnum
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from typing_extensions import Doc
from upath import UPath

from adpa.data.cache.locations import Location

# Text that may be a path: read_value expands a ~ at its beginning.
PathOrName = Annotated[str, "a path or a name"]

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
EngineName = Literal["auto", "hf", "vllm"]
HeadDtype = Literal["auto", "float32", "model"]
ModelName = Literal["teacher", "reference", "student"]


class Group(StrEnum):
    """The groups of a command's help, in their order: ``Annotated[type, Doc("help"), Group.TRAINING]``."""

    DECIDE = "Decide these first"
    DATA = "Data"
    MODELS = "Models"
    SIGNALS = "Signals"
    LOSS = "Loss"
    TRAINING = "Training"
    VALIDATION = "Validation"
    ADAPTERS = "LoRA and QLoRA"
    SAMPLING = "Sampling"
    ENGINE = "Engine"
    MEMORY = "Memory and device"
    SAVING = "Logs, checkpoints, resuming"
    SCALE = "Beyond one process"
    DRY_RUN = "Before a run"
    OTHER = "Other"


TeacherOption = Annotated[
    PathOrName,
    Doc("The large preference-aligned model: a directory, or org/name[@revision] of the Hub."),
    Group.DECIDE,
]
CacheArgument = Annotated[Location, Doc("Directory or URL of the teacher-signal cache."), Group.DECIDE]
ResponseSetOption = Annotated[
    str | None,
    Doc("Response set: chosen, rejected or sampled, or one of them by its id, the beginning of its id, or its file."),
    Group.SIGNALS,
]
ScoringOption = Annotated[str | None, Doc("Scoring, by its id, the beginning of its id, or its folder."), Group.SIGNALS]

SplitOption = Annotated[
    str | None, Doc("Split of a data set that has several, or a slice of one, such as train[:1000]."), Group.DATA
]
LimitOption = Annotated[int | None, Doc("Read only so many rows, the first ones."), Group.DATA]
MapOption = Annotated[
    str | None, Doc("Columns that have other names in the data: prompt=question,chosen=answer_a."), Group.DATA
]
MaxPromptLengthOption = Annotated[int, Doc("Tokens of a prompt that are kept, from its end."), Group.DATA]
DropInvalidOption = Annotated[bool, Doc("Leave out rows that cannot be used, and count them by reason."), Group.DATA]
ChatTemplateKwargsOption = Annotated[
    Mapping[str, Any] | None,
    Doc("Arguments of the chat template as a JSON object; a column chat_template_kwargs of a row goes before them."),
    Group.DATA,
]
RenderedOption = Annotated[
    bool, Doc("Prompts are text that a chat template has rendered already; they are taken as they are."), Group.DATA
]
AllowControlTokensOption = Annotated[
    bool, Doc("Take messages with control tokens such as <|im_start|> in their text."), Group.DATA
]

AttnImplementationOption = Annotated[
    str | None,
    Doc("Attention of transformers: sdpa, eager, flash_attention_2, …; default: what transformers chooses."),
    Group.MODELS,
]
TrustRemoteCodeOption = Annotated[
    bool,
    Doc("Run Python code from a model's repository. Such code can do all that you can: read it first."),
    Group.MODELS,
]

SamplesPerPromptOption = Annotated[int, Doc("Responses sampled for each prompt."), Group.SAMPLING]
TemperatureOption = Annotated[float, Doc("Sampling temperature; 0 is greedy."), Group.SAMPLING]
SamplingTopPOption = Annotated[float, Doc("Nucleus of the sampling distribution."), Group.SAMPLING]
MaxNewTokensOption = Annotated[int, Doc("Tokens of a sampled response at most."), Group.SAMPLING]
SamplingSeedOption = Annotated[int, Doc("Seed of the sampling."), Group.SAMPLING]

EngineOption = Annotated[
    EngineName,
    Doc("What runs the models: vllm, hf (transformers), or auto: vllm if it is installed and there is a GPU."),
    Group.ENGINE,
]
TensorParallelOption = Annotated[int, Doc("vLLM: GPUs that share the teacher, and the reference."), Group.ENGINE]
QuantizationOption = Annotated[
    str | None, Doc("vLLM: how to quantize teacher and reference, such as fp8."), Group.ENGINE
]
GpuMemoryUtilizationOption = Annotated[float, Doc("vLLM: share of a GPU's memory that it may take."), Group.ENGINE]
EngineArgOption = Annotated[
    list[str] | None,
    Doc("vLLM: key=value of any engine argument, for one model with teacher:, reference: or student:; repeatable."),
    Group.ENGINE,
]
BatchTokensOption = Annotated[
    int | None,
    Doc(
        "Tokens of a batch, which becomes a file. Default: 262144 with vLLM; with hf what the GPU's free memory has "
        "room for, or 8192 on a CPU."
    ),
    Group.MEMORY,
]
DtypeOption = Annotated[DtypeName, Doc("Dtype to compute in; auto is the checkpoint's own."), Group.MEMORY]
DeviceOption = Annotated[str, Doc("cpu, cuda, cuda:1, …; auto is a GPU if there is one."), Group.MEMORY]


def kind_of(parameter: inspect.Parameter) -> Any:
    """What ``read_value`` reads for it; for a list, each of its values."""
    annotated, *beside = get_args(parameter.annotation)
    if get_args(PathOrName)[1] in beside:  # an annotated type in another one is flat
        return PathOrName
    types = [one for one in get_args(annotated) if one is not NoneType]
    if get_origin(annotated) is Literal or not types:
        return annotated
    if UPath in types:
        return Location
    if get_origin(annotated) is list:
        return types[0]
    (one,) = types
    if get_origin(one) is list:
        return get_args(one)[0]
    return Mapping if get_origin(one) is Mapping else one


def is_list(parameter: inspect.Parameter) -> bool:
    """Whether the option repeats."""
    annotated = get_args(parameter.annotation)[0]
    return list in (get_origin(annotated), *map(get_origin, get_args(annotated)))
