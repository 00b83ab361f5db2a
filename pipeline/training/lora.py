"""Training low-rank adapters instead of the weights: LoRA through PEFT, and QLoRA, on a base in 4 bits.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022 (arXiv 2106.09685); Dettmers et al.,
"QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023 (arXiv 2305.14314). A linear layer W [out, in] becomes
W + alpha / rank · B·A with A [rank, in] random and B [out, rank] zero: training begins at the student as it was, and
its own weights, head and embeddings among them, stay.

The only module that imports PEFT and bitsandbytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adpa.errors import ModelError, OptionError
from adpa.pipeline.models.checkpoint import Checkpoint

ALL_LINEAR = "all-linear"
ALPHA_PER_RANK = 2  # as TRL's defaults have it


@dataclass(frozen=True)
class LoraSettings:
    """What is trained.

    Attributes:
        rank: of each adapter.
        alpha: an adapter's product is scaled by alpha / rank.
        targets: names, or last parts of names, of the linear layers that get adapters; empty for all but the head.
        load_in_4bit: whether the layers' own weights are held in 4 bits.
    """

    rank: int
    alpha: int
    targets: Sequence[str]
    load_in_4bit: bool

    @property
    def packages(self) -> tuple[str, ...]:
        """The packages that this needs."""
        return ("peft", "bitsandbytes") if self.load_in_4bit else ("peft",)

    @property
    def record(self) -> dict[str, Any]:
        """What a run that goes on has to have in common with its beginning."""
        targets = list(self.targets) or ALL_LINEAR
        return {"rank": self.rank, "alpha": self.alpha, "targets": targets, "load_in_4bit": self.load_in_4bit}


def lora_settings(rank: int | None, target: str | None, load_in_4bit: bool) -> LoraSettings | None:
    """What the options ask for; None for training all weights.

    Raises:
        OptionError: they do not go together, or a package is not installed.
    """
    if rank is None:
        for option, is_given in {"--lora-target": target is not None, "--load-in-4bit": load_in_4bit}.items():
            if is_given:
                raise OptionError(f"{option} without --lora-rank", "give a rank, such as --lora-rank 16")
        return None
    if rank < 1:
        raise OptionError(f"--lora-rank {rank}; expected at least 1")
    targets = sorted({name.strip() for name in (target or ALL_LINEAR).split(",")})
    if "" in targets or (ALL_LINEAR in targets and len(targets) > 1):
        raise OptionError(f"--lora-target {target}; expected {ALL_LINEAR}, or names of layers with commas between them")
    settings = LoraSettings(rank, ALPHA_PER_RANK * rank, [] if targets == [ALL_LINEAR] else targets, load_in_4bit)
    for package in settings.packages:
        if find_spec(package) is None:
            option, extra = ("--lora-rank", "lora") if package == "peft" else ("--load-in-4bit", "qlora")
            raise OptionError(f"{option} needs {package}, which is not installed", f"pip install 'adpa[{extra}]'")
    return settings


def load_base(
    checkpoint: Checkpoint, settings: LoraSettings, dtype: str, compute_dtype: str, device: torch.device
) -> PreTrainedModel:
    """Loads the student to which adapters are added: as it is on disk, or its linear layers, but the head, in NF4.

    Args:
        checkpoint: the student.
        settings: what is trained.
        dtype: of the weights that are not in 4 bits.
        compute_dtype: in which the products with weights of 4 bits are computed.
        device: where weights of 4 bits are to lie; others are loaded on the CPU.

    Raises:
        ModelError: its weights are quantized on disk, so that adapters cannot be merged into them.
    """
    if checkpoint.is_quantized:
        raise ModelError(
            f"{checkpoint.name}: its weights are quantized on disk; adapters are merged into weights that are not",
            "name the checkpoint it was made from; --load-in-4bit quantizes in memory",
        )
    if not settings.load_in_4bit:
        return checkpoint.load(dtype, torch.device("cpu"))
    in_4bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )
    from bitsandbytes.nn.modules import Linear4bit

    model = checkpoint.load(dtype, device, quantization_config=in_4bit, device_map={"": device})
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # In eval mode on some CPUs it would pack its weights for good, for a product without a gradient.
            module.support_avx512bf16_for_cpu = False
    return model


def add_adapters(model: PreTrainedModel, settings: LoraSettings) -> Any:
    """The PeftModel around a student, in which adapters in float32 are all that is trained.

    A's random numbers are torch's next ones.

    Raises:
        OptionError: a target is no linear layer of the decoder.
    """
    from peft import LoraConfig, get_peft_model

    _check_targets(model, settings.targets)
    # The head is wrapped by no adapter: the loss takes its weight, and computes no gradient for it.
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=list(settings.targets) or ALL_LINEAR,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    return get_peft_model(model, config)


def merge_adapters(checkpoint: Checkpoint, adapters: Path, dtype: str) -> PreTrainedModel:
    """The student with adapters merged into its own weights as they are on disk, in a dtype, on the CPU.

    It also writes into the adapters' configuration what others need to load them: the name of their checkpoint, and
    that it is a causal language model.
    """
    from peft import PeftModel, TaskType

    model: Any = PeftModel.from_pretrained(checkpoint.load(dtype, torch.device("cpu")), adapters)
    config = model.active_peft_config
    config.base_model_name_or_path = checkpoint.name.partition("@")[0] if checkpoint.revision else checkpoint.name
    config.revision = checkpoint.revision
    config.task_type, config.auto_mapping = TaskType.CAUSAL_LM, None
    config.save_pretrained(adapters)
    return model.merge_and_unload()


def _check_targets(model: PreTrainedModel, targets: Sequence[str]) -> None:
    """PEFT takes what matches any of them, and tells of a wrong one only if none does."""
    tied = (model.get_output_embeddings(), model.get_input_embeddings())
    modules = {name: module for name, module in model.named_modules() if name}
    for target in targets:
        found = [module for name, module in modules.items() if f".{name}".endswith(f".{target}")]
        if any(module in tied for module in found):
            raise OptionError(
                f"--lora-target {target}: the head and the embeddings stay as they are",
                "name layers of the decoder",
            )
        if not found or not all(isinstance(module, torch.nn.Linear | Conv1D) for module in found):
            linear = {
                name.rpartition(".")[2]
                for name, module in modules.items()
                if isinstance(module, torch.nn.Linear | Conv1D) and module not in tied
            }
            raise OptionError(
                f"--lora-target {target}: no linear layer of {type(model).__name__} has this name; "
                f"there are {', '.join(sorted(linear))}"
            )
