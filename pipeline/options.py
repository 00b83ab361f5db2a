"""Options that commands share: one type, one help text and one group for all; ranges. Imports no model library."""

from collections.abc import Mapping
from enum import StrEnum
from math import inf
from numbers import Integral, Real
from typing import Annotated, Any, Literal, get_args

from typing_extensions import Doc

from adpa.data.cache.locations import Location
from adpa.errors import OptionError, did_you_mean

MOST = 2**31 - 1  # of a count
LARGEST_SEED = 2**63 - 1
LEAST_TEMPERATURE = 1e-6
DEVICES = ("cpu", "cuda", "mps", "xpu")

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
    SIGNALS = "Signals"
    LOSS = "Loss"
    TRAINING = "Training"
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

SplitOption = Annotated[str | None, Doc("Split of a data set that has several."), Group.DATA]
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


def check_counts(options: Mapping[str, int | None]) -> None:
    """Checks that the values of options are whole numbers of at least 1; None is left to its default.

    Raises:
        OptionError: one is not.
    """
    for option, value in options.items():
        if value is None:
            continue
        if not _is_whole(value) or value < 1:
            raise OptionError(f"{option} {value}; expected at least 1" + ("" if _is_whole(value) else ", whole"))
        if value > MOST:
            raise OptionError(f"{option} {value}; expected at most {MOST}")


def check_shares(options: Mapping[str, float]) -> None:
    """Checks that the values of options are above 0 and at most 1.

    Raises:
        OptionError: one is not.
    """
    for option, value in options.items():
        if not _is_number(value) or not 0 < value <= 1:
            raise OptionError(f"{option} {_shown(value)}; expected more than 0 and at most 1")


def check_temperature(value: float) -> None:
    """Checks a sampling temperature: 0, or large enough to divide logits by it.

    Raises:
        OptionError: it is another value.
    """
    option = f"--temperature {_shown(value)}"
    if not _is_number(value) or not 0 <= value < inf:
        raise OptionError(f"{option}; expected 0 or more" + ("" if _is_number(value) and value < 0 else ", finite"))
    if 0 < value < LEAST_TEMPERATURE:
        raise OptionError(f"{option}; expected at least {LEAST_TEMPERATURE:g}, or 0, which is greedy")


def check_seed(value: int) -> None:
    """Checks the seed of a run.

    Raises:
        OptionError: it is no whole number, or out of range.
    """
    if not _is_whole(value) or not 0 <= value <= LARGEST_SEED:
        raise OptionError(f"--seed {value}; expected a whole number from 0 to 2^63 − 1")


def check_choices(options: Mapping[str, tuple[str, Any]]) -> None:
    """Checks values against the names of their ``Literal`` types; the command line has done so already.

    Raises:
        OptionError: one is not among them.
    """
    for option, (value, names) in options.items():
        known = get_args(names)
        if value not in known:
            fix = did_you_mean(str(value), known)
            raise OptionError(f"{option} {value!r}; expected one of {', '.join(known)}", fix)


def check_names(options: Mapping[str, str | None]) -> None:
    """Checks that no option has an empty value, such as that of an unset variable of a shell.

    Raises:
        OptionError: one has.
    """
    for option, value in options.items():
        if value is not None and not value.strip():
            raise OptionError(f"{option} {value!r}: an empty value", "give one, or leave the option out")


def check_device(device: str) -> None:
    """Checks the form of ``--device``; torch must say whether there is such a device.

    Raises:
        OptionError: it is no name of a device.
    """
    kind, colon, number = device.partition(":")
    numbered = not colon or (kind in ("cuda", "xpu") and number.isascii() and number.isdigit() and len(number) < 4)
    if device != "auto" and (kind not in DEVICES or not numbered):
        raise OptionError(
            f"--device {device or repr(device)}; expected auto, cpu, cuda, or cuda:1 for one of several GPUs"
        )


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
