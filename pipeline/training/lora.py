"""Training low-rank adapters instead of the weights: LoRA through PEFT, and QLoRA, on a base in 4 bits.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022 (arXiv 2106.09685); Dettmers et al.,
"QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023 (arXiv 2305.14314). A linear layer W [out, in] becomes
W + alpha / rank · B·A with A [rank, in] random and B [out, rank] zero: training starts from the unchanged student.
Its own weights stay, head and embeddings included.

The only module that imports bitsandbytes.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adpa.errors import ModelError, OptionError, did_you_mean
from adpa.pipeline.models import adapters
from adpa.pipeline.models.checkpoint import Checkpoint
from adpa.pipeline.models.launcher import number_of_ranks
from adpa.pipeline.models.merged_weights import merged_weights
from adpa.pipeline.models.weight_files import ADAPTER_CONFIG
from adpa.pipeline.training.lora_settings import ALL_LINEAR, LoraSettings


def load_base(
    checkpoint: Checkpoint, settings: LoraSettings, dtype: str, compute_dtype: str, device: torch.device
) -> PreTrainedModel:
    """Loads the student that gets adapters: as on disk, or with its linear layers, except the head, in NF4.

    Args:
        checkpoint: the student.
        settings: the adapters.
        dtype: dtype of the weights that are not in 4 bits.
        compute_dtype: dtype of products with 4-bit weights.
        device: device of 4-bit weights; other weights load on the CPU.

    Raises:
        ModelError: the weights are quantized on disk, and adapters cannot be merged into such weights; or the student
            is an adapter, 4 bits are asked for, and there are several ranks.
    """
    if checkpoint.is_quantized:
        raise ModelError(
            f"{checkpoint.name}: its weights are quantized on disk; adapters are merged into weights that are not",
            "name the checkpoint that it was made from; --load-in-4bit quantizes in memory",
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

    if checkpoint.adapter is not None and number_of_ranks() > 1:
        raise ModelError(
            f"{checkpoint.name}: it is an adapter, and with --load-in-4bit each of the {number_of_ranks()} ranks would "
            "write its merged weights",
            adapters.MERGE_YOURSELF,
        )
    with merged_weights(checkpoint, dtype) as whole:
        model = whole.load(dtype, device, quantization_config=in_4bit, device_map={"": device})
    if checkpoint.adapter is not None:
        model.name_or_path = str(checkpoint.adapter)  # what new adapters take for their base, not a temporary directory
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # In eval mode on some CPUs it would repack its weights permanently, for a product without a gradient.
            module.support_avx512bf16_for_cpu = False
    return model


def add_adapters(model: PreTrainedModel, settings: LoraSettings) -> Any:
    """Wraps a student into a PeftModel, in which only the adapters, in float32, are trained.

    The random numbers of A are the next ones of torch's generator.

    Raises:
        OptionError: a target is no linear layer of the decoder, or the rank is larger than a layer.
    """
    _check_targets(model, settings.targets)
    _check_rank(model, settings)
    # The head gets no adapter: the loss reads its weight directly, and computes no gradient for it.
    return adapters.add(
        model,
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.targets) or ALL_LINEAR,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )


def merge_adapters(checkpoint: Checkpoint, directory: Path, dtype: str) -> PreTrainedModel:
    """Merges adapters into the student's own weights from disk, in a dtype, on the CPU.

    Also completes the adapters' configuration, so that others can load them: the name of their checkpoint, and the
    task, causal language modelling. They get no name if the student is an adapter itself: its merged weights are
    nowhere on disk, and on the student's base these adapters would be another model.
    """
    model = adapters.merge(str(directory), checkpoint.load(dtype, torch.device("cpu")), directory)
    path = directory / ADAPTER_CONFIG
    config = json.loads(path.read_text())
    name = checkpoint.name.partition("@")[0] if checkpoint.revision else checkpoint.name
    config |= {"base_model_name_or_path": name, "revision": checkpoint.revision}
    if checkpoint.adapter is not None:
        config |= {"base_model_name_or_path": None, "revision": None}
    config |= {"task_type": "CAUSAL_LM", "auto_mapping": None}
    path.write_text(json.dumps(config, indent=2, sort_keys=True))
    return model


def _check_targets(model: PreTrainedModel, targets: Sequence[str]) -> None:
    """Checks each target: PEFT complains only if no target matches any layer."""
    tied = (model.get_output_embeddings(), model.get_input_embeddings())
    modules = {name: module for name, module in model.named_modules() if name}
    for target in targets:
        matching = [module for name, module in modules.items() if f".{name}".endswith(f".{target}")]
        if any(module in tied for module in matching):
            raise OptionError(
                f"--lora-target {target}: the head and the embeddings stay as they are",
                "name layers of the decoder",
            )
        if not matching or not all(isinstance(module, torch.nn.Linear | Conv1D) for module in matching):
            linear = {
                name.rpartition(".")[2]
                for name, module in modules.items()
                if isinstance(module, torch.nn.Linear | Conv1D) and module not in tied
            }
            raise OptionError(
                f"--lora-target {target}: no linear layer of {type(model).__name__} has this name; "
                f"expected one of {', '.join(sorted(linear))}",
                did_you_mean(target.rpartition(".")[2], linear),
            )


def _check_rank(model: PreTrainedModel, settings: LoraSettings) -> None:
    """Checks that no adapter has a larger rank than its layer: it would have more numbers, and could say no more."""
    tied = (model.get_output_embeddings(), model.get_input_embeddings())
    sizes = {}
    for name, module in model.named_modules():
        targeted = not settings.targets or any(f".{name}".endswith(f".{target}") for target in settings.targets)
        if targeted and module not in tied and isinstance(module, torch.nn.Linear | Conv1D):
            if isinstance(module, Conv1D):
                sizes[name] = (module.nx, module.nf)
            else:
                sizes[name] = (module.in_features, module.out_features)
    name, size = min(sizes.items(), key=lambda layer: min(layer[1]))
    if settings.rank > min(size):
        raise OptionError(
            f"--lora-rank {settings.rank}: larger than the layer {name} ({size[0]} × {size[1]})",
            f"choose {min(size)} at most, or name larger layers with --lora-target",
        )
